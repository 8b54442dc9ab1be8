"""What every page stands in: the project in use and the way to the other pages."""

from typing import Final

import streamlit as st

from core.errors import DanluError
from core.project import Project, read_mark
from pages.ui.guide import chapter_button
from pages.ui.page_table import GUIDE, ICONS, PAGES, SECTIONS
from pages.ui.projects import current_project, settings
from pages.ui.text import show_error, t
from pages.ui.tour import show_hint
from pages.ui.welcome import welcome

__all__ = ["ICONS", "PAGES", "SECTIONS", "current_project", "missing", "page_header", "require_project", "settings"]


_CONTRAST: Final = "<style>[data-testid^='stBaseButton-primary'] { color: light-dark(#FFFFFF, #1C1917); }</style>"
"""Streamlit writes white on the primary colour, in the dark theme too, where that colour must be bright to be read as text.
No colour gives 4.5 : 1 both ways, and the theme has no option for it."""


def set_contrast() -> None:
    """What the theme cannot say, so that every label keeps the contrast of WCAG AA."""
    st.html(_CONTRAST)


def page_table() -> dict[str, list[st.Page]]:
    """Pages for the router. Streamlit gives the default page no path of its own, so that it is there twice: `/` and `/start`."""
    sections = {
        t(f"shell.sections.{section}"): [
            st.Page(PAGES[name], title=t(f"shell.pages.{name}"), icon=ICONS[name], url_path=name) for name in names
        ]
        for section, names in SECTIONS.items()
    }
    home = st.Page(PAGES["start"], title=t("shell.pages.start"), icon=ICONS["start"], url_path="", default=True)
    guide = st.Page(GUIDE, title=t("start.guide.title"), icon=":material/menu_book:", url_path="guide")
    return {"": [home, guide], **sections}


def require_project() -> Project:
    """The project in use; without one, the page welcomes, asks for one and ends here. One of a newer app is refused in words."""
    project = current_project()
    if project is None:
        welcome()
        st.stop()
    try:
        read_mark(project)
    except DanluError as error:
        show_error(error)
        st.stop()
    return project


def page_header(name: str) -> None:
    """Title of the page, one line on what it is for, its chapter of the guide, and the tour's hint where a tour is on."""
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", gap="small"):
        st.title(t(f"shell.pages.{name}"), width="content")
        chapter_button(name)
    st.caption(t(f"{name}.intro"))
    show_hint(name, current_project())


def missing(text: str, page: str) -> None:
    """Say what is missing and link to the page that makes it."""
    with st.container(border=True):
        st.markdown(text)
        st.page_link(PAGES[page], label=t("shell.go_to", page=t(f"shell.pages.{page}")), icon=ICONS[page])
