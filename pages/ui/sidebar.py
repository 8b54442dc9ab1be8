"""The sidebar: language, project in use, and the steps of the journey with what is done, read from the disk."""

from pathlib import Path
from typing import Final

import streamlit as st

from core.i18n import LANGUAGE_NAMES, LANGUAGES
from core.journey import StepState, steps
from pages.ui import shell
from pages.ui.page_table import GUIDE
from pages.ui.projects import current_project, project_forms, projects
from pages.ui.text import language, t

_LOGO: Final = str(Path(__file__).parent / "logo.svg")
_MARKS: Final = {StepState.DONE: " ✓", StepState.ACTIVE: " …", StepState.OPEN: ""}


def choose_language() -> None:
    """Before anything is drawn: the language from the URL or the browser, unless it was chosen in this session."""
    if st.session_state.get("language") not in LANGUAGES:
        asked = st.query_params.get("lang")
        st.session_state["language"] = asked if asked in LANGUAGES else language()


def show() -> None:
    """Draw the whole sidebar."""
    st.logo(_LOGO, size="large")
    with st.sidebar:
        _project_row()
        _step_links()
        st.page_link(GUIDE, label=t("start.guide.title"), icon=":material/menu_book:", width="stretch")
        st.segmented_control(
            t("shell.language"),
            LANGUAGES,
            format_func=LANGUAGE_NAMES.__getitem__,
            key="language",
            label_visibility="collapsed",
            required=True,
        )


def _project_row() -> None:
    found = projects()
    current = current_project()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        if found:
            names = list(found)
            index = next((i for i, name in enumerate(names) if current and found[name].root == current.root), None)
            chosen = st.selectbox(
                t("shell.project"),
                names,
                index=index,
                placeholder=t("shell.choose_project"),
                label_visibility="collapsed",
            )
            if chosen is not None and (current is None or found[chosen].root != current.root):
                st.session_state["project_root"] = str(found[chosen].root)
                st.rerun()
            with st.popover("", icon=":material/create_new_folder:", help=t("shell.new_project"), key="shell_projects"):
                project_forms("shell")


def _step_links() -> None:
    done = steps(current_project())
    for section, names in shell.SECTIONS.items():
        if len(names) > 1:
            st.caption(t(f"shell.sections.{section}"))
        with st.container(gap="xxsmall"):
            for name in names:
                label = f"{t(f'shell.pages.{name}')}{_MARKS[done.get(name, StepState.OPEN)]}"
                st.page_link(shell.PAGES[name], label=label, icon=shell.ICONS[name], width="stretch")
