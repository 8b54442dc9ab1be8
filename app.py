"""Router: page config, language, project, the page table. Run it with `streamlit run app.py`."""

import streamlit as st

from pages.ui import projects, shell, sidebar
from pages.ui.text import t

st.set_page_config(page_title="Danlu 丹炉", page_icon="🔥", layout="wide", initial_sidebar_state="expanded")
sidebar.choose_language()
projects.choose_project()
navigation = st.navigation(
    {
        t(f"shell.sections.{section}"): [
            st.Page(shell.PAGES[name], title=t(f"shell.pages.{name}"), icon=shell.ICONS[name], url_path=name)
            for name in names
        ]
        for section, names in shell.SECTIONS.items()
    },
    position="hidden",
)
sidebar.show()
navigation.run()
