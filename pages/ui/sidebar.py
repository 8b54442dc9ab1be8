"""The sidebar: language, project in use, and the steps of the journey with what is done, read from the disk."""

import streamlit as st

from core.errors import DanluError
from core.i18n import LANGUAGE_NAMES, LANGUAGES
from core.journey import Progress, steps
from core.project import create_project, open_project, remember_project
from pages.ui import shell
from pages.ui.text import language, show_error, t

_MARKS = {Progress.DONE: " ✓", Progress.ACTIVE: " …", Progress.OPEN: ""}


def choose_language() -> None:
    """Before anything is drawn: take the language from the widget, the URL or the browser."""
    if st.session_state.get("language") not in LANGUAGES:
        asked = st.query_params.get("lang")
        st.session_state["language"] = asked if asked in LANGUAGES else language()
