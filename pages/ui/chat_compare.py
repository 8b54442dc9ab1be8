"""The same questions to two to four models: choose, run as a job, read side by side, vote."""

import streamlit as st

from core.chat.comparison import (
    KIND,
    MOST_MODELS,
    Comparison,
    columns_of,
    list_comparisons,
    load_comparison,
    start_comparison,
    vote,
)
from core.chat.markdown import safe_markdown
from core.chat.models import ChatModel
from core.chat.run_answers import JOB_KIND
from core.errors import DanluError
from core.project import Project
from core.runs.jobs import list_jobs
from core.runs.state import read_status
from pages.ui.audit import note
from pages.ui.chat_export import export_comparison
from pages.ui.chat_from_run import PARAMETER, follow_address
from pages.ui.chat_history import facts, show_answer
from pages.ui.jobs import job_panel
from pages.ui.text import show_error, t

_SHOWN = 20
_REFRESH_SECONDS = 2.0


def compare_view(project: Project, models: list[ChatModel]) -> None:
    """The form, the job that asks, and the table of one comparison."""
    saved = list_comparisons(project)[:_SHOWN]
    is_asked = bool(st.query_params.get(PARAMETER))
    follow_address(project, models)
    with st.expander(t("chat.compare_many.new"), expanded=is_asked or not saved, icon=":material/compare:"):
        _form(project, models)
    job_panel(project, (KIND, JOB_KIND))
    is_running = any(read_status(run).phase.is_active for run in list_jobs(project, (KIND,)))
    if not saved:
        return
    if st.session_state.get("chat_comparison") not in saved:
        st.session_state["chat_comparison"] = saved[0]
    chosen = st.selectbox(
        t("chat.compare_many.saved"),
        saved,
        key="chat_comparison",
        format_func=_date,
        help=t("chat.compare_many.saved_help"),
    )
    st.fragment(_live_table, run_every=_REFRESH_SECONDS if is_running else None)(project, str(chosen))


def _live_table(project: Project, identity: str) -> None:
    """Answers appear as they come."""
    try:
        _table(project, load_comparison(project, identity))
    except DanluError as error:
        show_error(error)


def _form(project: Project, models: list[ChatModel]) -> None:
    usable = {model.id: model for model in models if model.is_there}
    names = {identity: f"{t(f'chat.kinds.{model.kind}')} · {model.name}" for identity, model in usable.items()}
    chosen = st.multiselect(
        t("chat.compare_many.models"), list(usable), format_func=names.__getitem__, max_selections=MOST_MODELS,
        key="chat_compare_models", placeholder=t("chat.compare_many.choose"), persist_state="session",
        help=t("chat.compare_many.models_help"),
    )  # fmt: skip
    text = st.text_area(
        t("chat.compare_many.questions"), key="chat_compare_questions", height=110, persist_state="session",
        placeholder=t("chat.compare_many.example"), help=t("chat.compare_many.questions_help")
    )  # fmt: skip
    is_one = "\n" in text.strip() and st.checkbox(
        t("chat.compare_many.one_question"), key="chat_compare_one", persist_state="session"
    )
    st.session_state.setdefault("chat_compare_system", st.session_state.get("chat_system", ""))
    system = st.text_input(
        t("chat.settings.system"), key="chat_compare_system", persist_state="session",
        help=t("chat.settings.system_help"),
    ).strip()  # fmt: skip
    left, middle, right, button = st.columns([1, 1, 1, 1], vertical_alignment="bottom")
    settings = {
        "temperature": left.number_input(
            t("chat.settings.temperature"),
            0.0,
            2.0,
            0.0,
            0.1,
            key="chat_compare_heat",
            help=t("chat.settings.temperature_help"),
        ),
        "seed": middle.number_input(
            t("chat.settings.seed"), 0, 2**31 - 1, 0, key="chat_compare_seed", help=t("chat.settings.seed_help")
        ),
        "max_tokens": right.number_input(
            t("chat.settings.max_tokens"),
            8,
            4096,
            256,
            8,
            key="chat_compare_length",
            help=t("chat.settings.max_tokens_help"),
        ),
    }
    is_ready = len(chosen) > 1 and bool(text.strip())
    if button.button(
        t("chat.compare_many.run"), type="primary", key="chat_compare_run", width="stretch", disabled=not is_ready,
        help=None if is_ready else t("chat.compare_many.needs"),
    ):  # fmt: skip
        try:
            columns = columns_of([usable[identity] for identity in chosen])
            comparison, _ = start_comparison(
                project, columns, [text] if is_one else text.splitlines(), settings, system
            )
            note("start", f"compare {comparison.id}")
        except DanluError as error:
            show_error(error)
            return
        st.session_state["chat_comparison"] = comparison.id
        st.rerun()


def _table(project: Project, comparison: Comparison) -> None:
    wins = comparison.wins()
    heads = st.columns(len(comparison.columns))
    for head, column, count in zip(heads, comparison.columns, wins, strict=True):
        head.markdown(f"**{safe_markdown(column.label)}** · {t('chat.compare_many.votes', count=count)}")
    for question, text in enumerate(comparison.questions):
        with st.container(border=True):
            st.markdown(f":material/person: {safe_markdown(text)}")
            for at, place in enumerate(st.columns(len(comparison.columns))):
                with place:
                    _answer(project, comparison, question, at)
    export_comparison(project, comparison)


def _answer(project: Project, comparison: Comparison, question: int, column: int) -> None:
    answer = comparison.answer(question, column)
    if answer is None:
        st.caption(t("chat.compare_many.none_yet"))
        return
    show_answer(str(answer["text"]))
    st.caption(facts(answer.get("usage") or {}, answer.get("reason")))
    is_best = comparison.votes.get(str(question)) == column
    st.button(
        t("chat.compare_many.best"), key=f"chat_vote_{comparison.id}_{question}_{column}",
        icon=":material/check_circle:" if is_best else ":material/thumb_up:", type="primary" if is_best else "tertiary",
        on_click=vote, args=(project, comparison.id, question, None if is_best else column),
    )  # fmt: skip


def _date(identity: str) -> str:
    """`compare_20260131_142501` → 2026-01-31 14:25:01."""
    day, clock = identity.split("_")[1:3]
    return f"{day[:4]}-{day[4:6]}-{day[6:8]} {clock[:2]}:{clock[2:4]}:{clock[4:6]}"
