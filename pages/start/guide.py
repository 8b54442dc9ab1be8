"""Guide: the user guide with its pictures and its glossary, read where it is needed."""

import streamlit as st

from pages.ui.guide import whole_guide
from pages.ui.text import t

st.title(t("start.guide.title"))
st.caption(t("start.guide.intro"))
whole_guide()
