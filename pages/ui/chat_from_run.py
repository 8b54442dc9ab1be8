"""A comparison that begins at a sample answer of a training run: the same prompt, that checkpoint beside its base."""

import streamlit as st

from core.chat.models import ChatModel
from core.chat.run_answers import AnswerLink, address, deliver, follow
from core.errors import DanluError
from core.project import Project
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.text import show_error, t

PARAMETER = "answer"
"""In the page's address: which sample answer."""


def compare_button(project: Project, link: AnswerLink | None) -> None:
    """One click: the compare page with this prompt; the adapter is taken out of the checkpoint if it was not yet."""
    if link is None:
        return
    if st.button(
        t("monitor.sample_compare", checkpoint=link.checkpoint.name), key=f"monitor_compare_{link.answer.iteration}",
        icon=":material/compare:", type="tertiary", disabled=not link.is_ready,
        help=t("monitor.sample_compare_help" if link.is_ready else "monitor.sample_compare_full"),
    ):  # fmt: skip
        _start(project, link)
        st.switch_page(shell.PAGES["chat"], query_params={PARAMETER: address(link)})


def wants_comparison() -> bool:
    """Whether the address asks for a comparison that has not been shown yet."""
    asked = st.query_params.get(PARAMETER)
    return bool(asked) and asked != st.session_state.get("chat_answer_asked")


def follow_address(project: Project, models: list[ChatModel]) -> None:
    """Fill the form from the address: the question once, the models as soon as they are there."""
    asked = st.query_params.get(PARAMETER)
    link = follow(project, asked) if asked else None
    if asked is None or link is None:
        return
    if asked != st.session_state.get("chat_answer_asked"):
        st.session_state["chat_answer_asked"] = asked
        st.session_state["chat_compare_questions"] = link.answer.prompt
        st.session_state["chat_compare_one"] = "\n" in link.answer.prompt.strip()
        st.session_state["chat_compare_system"] = link.answer.system
        st.session_state.pop("chat_answer_chosen", None)
    checkpoint = link.checkpoint.name
    st.caption(
        t("chat.compare_many.from_run", run=link.run.id, iteration=f"{link.answer.iteration:,}", checkpoint=checkpoint)
    )
    if st.session_state.get("chat_answer_chosen") == asked:
        return
    if found := link.models(models):
        st.session_state["chat_compare_models"] = [model.id for model in found if model.is_there]
        st.session_state["chat_answer_chosen"] = asked
    elif link.is_on_its_way(project):
        st.info(t("chat.compare_many.extracting", checkpoint=checkpoint), icon=":material/hourglass_top:")
    elif link.is_ready and st.button(t("chat.compare_many.extract", checkpoint=checkpoint), key="chat_answer_extract"):
        _start(project, link)
        st.rerun()


def _start(project: Project, link: AnswerLink) -> None:
    try:
        job = deliver(project, link)
    except DanluError as error:
        show_error(error)
        return
    if job is not None:
        note("export", f"{link.run.id} / {link.checkpoint.name}")
