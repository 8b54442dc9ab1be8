"""The steps of the journey with what each is for and how far it is."""

from collections.abc import Mapping

import streamlit as st

from core.journey import STEPS, StepState, next_step
from pages.ui.page_table import ICONS, PAGES
from pages.ui.text import t

_COLOURS = {StepState.DONE: "green", StepState.ACTIVE: "orange", StepState.OPEN: "gray"}
_ICONS = {
    StepState.DONE: ":material/check:",
    StepState.ACTIVE: ":material/progress_activity:",
    StepState.OPEN: ":material/radio_button_unchecked:",
}


def journey_list(states: Mapping[str, StepState]) -> None:
    """One row a step: a link, what it is for, and, in a project, its state; the next one is marked. `states`: empty without a project."""
    following = next_step(states) if states else None
    with st.container(gap="xsmall"):
        for step in STEPS:
            link, text, state = st.columns([2, 6, 1.6], vertical_alignment="center", gap="small")
            link.page_link(PAGES[step], label=t(f"shell.pages.{step}"), icon=ICONS[step])
            text.markdown(t(f"start.steps.{step}"))
            if states:
                with state:
                    _badge(states.get(step, StepState.OPEN), is_next=step == following)


def _badge(state: StepState, *, is_next: bool) -> None:
    if is_next and state is StepState.OPEN:
        st.badge(t("start.states.next"), icon=":material/arrow_forward:", color="blue")
    else:
        st.badge(t(f"start.states.{state}"), icon=_ICONS[state], color=_COLOURS[state])
