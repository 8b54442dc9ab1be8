"""The sidebar: language, project in use, and the steps of the journey with what is done, read from the disk."""

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from core.errors import DanluError
from core.i18n import LANGUAGE_NAMES, LANGUAGES
from core.journey import StepState, steps
from core.project import create_project, open_project, remember_project
from pages.ui import shell
from pages.ui.text import language, show_error, t

_MARKS = {StepState.DONE: "✓", StepState.ACTIVE: "…", StepState.OPEN: ""}


def choose_language() -> None:
    """Before anything is drawn: the language from the URL or the browser, unless it was chosen in this session."""
    if st.session_state.get("language") not in LANGUAGES:
        asked = st.query_params.get("lang")
        st.session_state["language"] = asked if asked in LANGUAGES else language()


def choose_project() -> None:
    """The project of this session: chosen before, named in the URL, or the only one there is."""
    if shell.current_project() is not None:
        return
    found = shell.projects()
    asked = st.query_params.get("project")
    name = asked if asked in found else next(iter(found), None) if len(found) == 1 else None
    if name is not None:
        st.session_state["project_root"] = str(found[name].root)


def show() -> None:
    """Draw the whole sidebar."""
    choose_project()
    with st.sidebar:
        st.markdown(f"## 🔥 {t('shell.title')}")
        _project_row()
        _step_links()
        st.space("small")
        st.segmented_control(
            t("shell.language"),
            LANGUAGES,
            format_func=LANGUAGE_NAMES.__getitem__,
            key="language",
            label_visibility="collapsed",
            required=True,
        )


def _project_row() -> None:
    found = shell.projects()
    current = shell.current_project()
    names = list(found)
    index = next((i for i, name in enumerate(names) if current and found[name].root == current.root), None)
    if names:
        chosen = st.selectbox(
            t("shell.project"), names, index=index, placeholder=t("shell.choose_project"), label_visibility="collapsed"
        )
        if chosen is not None and (current is None or found[chosen].root != current.root):
            st.session_state["project_root"] = str(found[chosen].root)
            st.rerun()
    with st.popover(t("shell.new_project"), icon=":material/create_new_folder:", width="stretch"):
        _project_forms()


def _project_forms() -> None:
    home = shell.settings().home
    with st.form("shell_create", border=False):
        name = st.text_input(t("shell.new_name"), placeholder="ft", help=t("shell.new_name_help", home=str(home)))
        if st.form_submit_button(t("shell.create"), type="primary", width="stretch"):
            _use(lambda: create_project(home, name.strip()).root)
    with st.form("shell_open", border=False):
        folder = st.text_input(t("shell.open_folder"), placeholder="/root/ft", help=t("shell.open_help"))
        if st.form_submit_button(t("shell.open"), width="stretch"):
            _use(lambda: _open(home, folder.strip()))


def _open(home: Path, folder: str) -> Path:
    project = open_project(Path(folder))
    remember_project(home, project.root)
    return project.root


def _use(make: Callable[[], Path]) -> None:
    try:
        st.session_state["project_root"] = str(make())
    except DanluError as error:
        show_error(error)
    else:
        st.rerun()


def _step_links() -> None:
    done = steps(shell.current_project())
    for section, names in shell.SECTIONS.items():
        st.caption(t(f"shell.sections.{section}"))
        for name in names:
            mark = _MARKS[done.get(name, StepState.OPEN)]
            label = t(f"shell.pages.{name}")
            st.page_link(shell.PAGES[name], label=f"{label} {mark}".strip(), icon=shell.ICONS[name], width="stretch")
