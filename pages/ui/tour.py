"""The tour of a first visit: the card that begins it, and a hint at the head of each page that leaves the page free."""

from typing import Final

import streamlit as st

from core import tour
from core.errors import DanluError
from core.journey import STEPS
from core.project import Project
from pages.ui.audit import note
from pages.ui.page_table import PAGES
from pages.ui.projects import settings
from pages.ui.text import show_error, t

_LABELS: Final = {
    "environment": {"check": "environment.check"},
    "dataset": {"learned": "dataset.views.learned"},
    "config": {
        "make": "config.make",
        "guide": "config.tab_guide",
        "recipe": "config.recipes.first_try",
        "apply": "config.recipe_apply",
        "save": "config.save",
    },
    "launch": {"start": "launch.start"},
    "monitor": {"samples": "monitor.tab_samples"},
    "export": {"start_merge": "export.start_merge", "verified": "export.verified"},
    "chat": {"load": "chat.load"},
}
"""Labels that a page's hint names, by their keys, so that it says what stands on the button."""


def try_card() -> None:
    """What the tour is, whose name the model will learn, and the button that begins it."""
    st.markdown(f"**:material/play_circle: {t('start.try.title')}**")
    st.markdown(t("start.try.text"))
    with st.form("start_try_form", border=False):
        author = st.text_input(
            t("start.try.author"),
            value=t("start.try.author_example"),
            key="start_author",
            help=t("start.try.author_help"),
        )
        if st.form_submit_button(t("start.try.go"), type="primary", key="start_try", icon=":material/rocket_launch:"):
            _begin(author.strip())


def show_hint(page: str, project: Project | None) -> None:
    """On a page of the journey, while the hints are on: what to click, what will be seen, where to go on."""
    if project is None or page not in STEPS or not tour.has_hints(project):
        return
    following = tour.next_page(page) or "start"
    labels = {name: t(key) for name, key in _LABELS.get(page, {}).items()}
    with st.container(border=True, key="tour_hint", gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center"):
            place = t("start.tour.place", number=STEPS.index(page) + 1, count=len(STEPS))
            st.markdown(f"**:material/tour: {place}**")
            goal = t("start.tour.next", page=t(f"shell.pages.{following}"))
            st.page_link(PAGES[following], label=goal, icon=":material/arrow_forward:")
            st.button(
                t("start.tour.hide"), key="tour_hide", type="tertiary", icon=":material/close:",
                on_click=tour.show_hints, args=(project, False), help=t("start.tour.hide_help"),
            )  # fmt: skip
        st.markdown(t(f"start.tour.{page}", **labels))


def hints_switch(project: Project) -> None:
    """On the start page: hints on or off for this project."""
    key = "start_hints"
    st.session_state[key] = tour.has_hints(project)
    st.toggle(
        t("start.tour.switch"),
        key=key,
        help=t("start.tour.switch_help"),
        on_change=lambda: tour.show_hints(project, bool(st.session_state[key])),
    )


def _begin(author: str) -> None:
    try:
        project = tour.start_tour(settings().home, author=author)
    except DanluError as error:
        show_error(error)
        return
    st.session_state["project_root"] = str(project.root)
    note("create", str(project.root))
    st.switch_page(PAGES[STEPS[0]])
