"""The first thing that a person without a project sees: what this is, a tour of five minutes, or a project of one's own."""

import streamlit as st

from pages.ui.journey import journey_list
from pages.ui.projects import project_forms
from pages.ui.text import t
from pages.ui.tour import try_card


def welcome() -> None:
    st.title(t("shell.welcome"))
    st.markdown(t("shell.welcome_text"))
    left, right = st.columns(2, gap="medium")
    with left, st.container(border=True, height="stretch"):
        try_card()
    with right, st.container(border=True, height="stretch"):
        st.markdown(f"**:material/create_new_folder: {t('start.own')}**")
        st.markdown(t("shell.no_project"))
        project_forms("welcome")
    journey_list({})
