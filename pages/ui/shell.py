"""What every page stands in: the project in use and the way to the other pages."""

from pathlib import Path
from typing import Final

import streamlit as st

from core import settings as core_settings
from core.project import Project, list_projects
from pages.ui.text import t

PAGES: Final = {
    "environment": "pages/prepare/environment.py",
    "model": "pages/prepare/model.py",
    "dataset": "pages/prepare/dataset.py",
    "config": "pages/prepare/config.py",
    "launch": "pages/train/launch.py",
    "monitor": "pages/train/monitor.py",
    "runs": "pages/train/runs.py",
    "export": "pages/deliver/export.py",
    "chat": "pages/deliver/chat.py",
}
"""Page name → script. The name is the URL, the key of its words and the prefix of its widget keys."""
ICONS: Final = {
    "environment": ":material/health_and_safety:",
    "model": ":material/deployed_code:",
    "dataset": ":material/dataset:",
    "config": ":material/tune:",
    "launch": ":material/rocket_launch:",
    "monitor": ":material/monitoring:",
    "runs": ":material/history:",
    "export": ":material/merge:",
    "chat": ":material/forum:",
}
SECTIONS: Final = {
    "prepare": ("environment", "model", "dataset", "config"),
    "train": ("launch", "monitor", "runs"),
    "deliver": ("export", "chat"),
}


def settings() -> core_settings.Settings:
    return core_settings.load()


def projects() -> dict[str, Project]:
    """Projects by the name shown for them; two of the same name are told apart by their folder."""
    found: dict[str, Project] = {}
    for project in list_projects(settings().home):
        found[project.name if project.name not in found else str(project.root)] = project
    return found


def current_project() -> Project | None:
    """The project chosen in the sidebar, if there is one."""
    root = st.session_state.get("project_root")
    return Project(Path(root)) if root and Path(root).is_dir() else None


def require_project() -> Project:
    """The project in use; without one, the page says so and ends here."""
    project = current_project()
    if project is None:
        st.info(t("shell.no_project"), icon=":material/folder_open:")
        st.stop()
    return project


def page_header(name: str) -> None:
    """Title of the page and one line on what it is for."""
    st.title(f"{t(f'shell.pages.{name}')}")
    st.caption(t(f"{name}.intro"))


def missing(text: str, page: str) -> None:
    """Say what is missing and link to the page that makes it."""
    with st.container(border=True):
        st.markdown(text)
        st.page_link(PAGES[page], label=t("shell.go_to", page=t(f"shell.pages.{page}")), icon=ICONS[page])
