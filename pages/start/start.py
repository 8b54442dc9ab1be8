"""Start: where the project in use stands on its journey, where to go on, and the tour of a first visit."""

import streamlit as st

from core.journey import next_step, steps
from pages.ui import shell
from pages.ui.journey import journey_list
from pages.ui.text import t
from pages.ui.tour import hints_switch, try_card

project = shell.require_project()
shell.page_header("start")
states = steps(project)
following = next_step(states) or "chat"
with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
    if st.button(
        t("start.go_on", page=t(f"shell.pages.{following}")),
        key="start_go_on",
        type="primary",
        icon=":material/arrow_forward:",
    ):
        st.switch_page(shell.PAGES[following])
    hints_switch(project)
journey_list(states)
with st.expander(t("start.try.title"), icon=":material/play_circle:"):
    try_card()
