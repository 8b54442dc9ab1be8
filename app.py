"""The router, and the door before it. Run it with `streamlit run app.py`.

The server imports this file once as a module, for its ASGI application with the login gate; each browser session runs it as a
script, for the pages.
"""

import streamlit as st
from starlette.middleware import Middleware
from streamlit.runtime.pages_manager import PagesManager

from core.access.gate import Gate
from pages.ui import door, projects, shell, sidebar

if __name__ != "__main__":
    # Else Streamlit takes pages/ for the page table of an old multipage app until the first `st.navigation`, and answers a deep
    # link that comes before it, such as a bookmark after a restart, with "Page not found".
    PagesManager.uses_pages_directory = False
    app = st.App(__file__, middleware=[Middleware(Gate, policy=door.policy(), on_event=door.record)])
else:
    st.set_page_config(page_title="Danlu 丹炉", page_icon="🔥", layout="wide", initial_sidebar_state="auto")
    shell.set_contrast()
    sidebar.choose_language()
    projects.choose_project()
    navigation = st.navigation(shell.page_table(), position="hidden")
    sidebar.show()
    navigation.run()
