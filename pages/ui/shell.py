"""What every page stands in: the project in use and the way to the other pages."""

from typing import Final

import streamlit as st

from core.project import Project
from pages.ui.projects import current_project, project_forms, settings
from pages.ui.text import t

__all__ = ["ICONS", "PAGES", "SECTIONS", "current_project", "missing", "page_header", "require_project", "settings"]

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


def require_project() -> Project:
    """The project in use; without one, the page welcomes, asks for one and ends here."""
    project = current_project()
    if project is None:
        st.title(t("shell.welcome"))
        st.markdown(t("shell.welcome_text"))
        left, _ = st.columns([3, 2])
        with left, st.container(border=True):
            st.markdown(t("shell.no_project"))
            project_forms("welcome")
        st.stop()
    return project


def page_header(name: str) -> None:
    """Title of the page and one line on what it is for."""
    st.title(t(f"shell.pages.{name}"))
    st.caption(t(f"{name}.intro"))


def missing(text: str, page: str) -> None:
    """Say what is missing and link to the page that makes it."""
    with st.container(border=True):
        st.markdown(text)
        st.page_link(PAGES[page], label=t("shell.go_to", page=t(f"shell.pages.{page}")), icon=ICONS[page])
