"""Which project this session works in: chosen, opened or made here."""

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from core import settings as core_settings
from core.errors import DanluError
from core.project import Project, create_project, list_projects, open_project, remember_project
from pages.ui.audit import note
from pages.ui.text import show_error, t


def settings() -> core_settings.Settings:
    return core_settings.load()


def projects() -> dict[str, Project]:
    """Projects by the name shown for them; two of the same name are told apart by their folder."""
    found: dict[str, Project] = {}
    for project in list_projects(settings().home):
        found[project.name if project.name not in found else str(project.root)] = project
    return found


def current_project() -> Project | None:
    """The project in use, if there is one."""
    root = st.session_state.get("project_root")
    return Project(Path(root)) if root and Path(root).is_dir() else None


def choose_project() -> None:
    """Before anything is drawn: the project chosen before, named in the URL, or the only one there is."""
    if current_project() is not None:
        return
    found = projects()
    asked = st.query_params.get("project")
    name = asked if asked in found else next(iter(found), None) if len(found) == 1 else None
    if name is not None:
        st.session_state["project_root"] = str(found[name].root)


def project_forms(place: str) -> None:
    """Forms to make a project or to open a folder as one. `place` keeps the keys of two copies on one page apart."""
    home = settings().home
    with st.form(f"{place}_create", border=False):
        name = st.text_input(
            t("shell.new_name"), value="ft", key=f"{place}_name", help=t("shell.new_name_help", home=str(home))
        )
        if st.form_submit_button(t("shell.create"), type="primary", key=f"{place}_create_button"):
            _use("create", lambda: create_project(home, name.strip()).root)
    with st.form(f"{place}_open", border=False):
        folder = st.text_input(
            t("shell.open_folder"), placeholder="/root/ft", key=f"{place}_folder", help=t("shell.open_help")
        )
        if st.form_submit_button(t("shell.open"), key=f"{place}_open_button"):
            _use("open", lambda: _open(home, folder.strip()))


def _open(home: Path, folder: str) -> Path:
    project = open_project(Path(folder))
    remember_project(home, project.root)
    return project.root


def _use(action: str, make: Callable[[], Path]) -> None:
    try:
        root = make()
    except DanluError as error:
        show_error(error)
        return
    st.session_state["project_root"] = str(root)
    note(action, str(root))
    st.rerun()
