"""The text side of a run: its log with a filter, its sample answers, its command."""

import shlex

import streamlit as st

from core.chat.run_answers import links
from core.errors import DanluError
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.logs import TAIL_BYTES, Level, log_file, read_tail, select
from core.runs.samples import read_answers
from pages.ui.chat_from_run import compare_button
from pages.ui.text import gib, show_error, t

_SHOWN_LINES = 500


def run_log(run: RunDirectory) -> None:
    """The tail of the log, searched and filtered."""
    query, level = st.columns([3, 2], vertical_alignment="bottom")
    needle = query.text_input(t("monitor.log_search"), key="monitor_log_search", help=t("monitor.log_search_help"))
    levels = {name: t(f"monitor.levels.{name}") for name in Level}
    chosen = level.segmented_control(
        t("monitor.log_level"),
        list(levels),
        format_func=levels.__getitem__,
        default=Level.INFO,
        key="monitor_log_level",
    )
    tail = read_tail(log_file(run))
    show_lines(select(tail.lines, needle, Level(chosen or Level.INFO)), has_log=bool(tail.lines))
    if tail.is_cut:
        st.caption(t("monitor.log_cut", size=gib(TAIL_BYTES), path=str(log_file(run))))


def show_lines(lines: list[str], *, has_log: bool, height: int = 380) -> None:
    """The last lines, scrolled to the end."""
    if not lines:
        st.caption(t("monitor.log_empty" if has_log else "monitor.log_none"))
        return
    with st.container(height=height, autoscroll=True):
        st.code("\n".join(lines[-_SHOWN_LINES:]), language=None, wrap_lines=True)


def run_samples(project: Project, run: RunDirectory) -> None:
    """Answers to each fixed prompt over time, the newest first; each can be asked anew beside the base model."""
    answers = read_answers(run)
    if not answers:
        st.caption(t("monitor.no_samples"))
        return
    prompts = list(dict.fromkeys(answer.prompt for answer in answers))
    prompt = st.selectbox(
        t("monitor.sample_prompt"), prompts, key="monitor_sample_prompt", help=t("monitor.sample_prompt_help")
    )
    shown = [answer for answer in reversed(answers) if answer.prompt == prompt]
    for answer, link in zip(shown, links(project, run, shown), strict=True):
        with st.container(border=True):
            with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
                st.caption(t("monitor.sample_at", iteration=f"{answer.iteration:,}"))
                compare_button(project, link)
            st.text(answer.answer)


def run_details(run: RunDirectory) -> None:
    """The exact command, the folder, and what run.json says about the run."""
    st.markdown(f"**{t('monitor.folder')}**")
    st.code(str(run.path), language=None)
    if not run.spec_file.exists():
        return
    try:
        spec = run.spec()
    except DanluError as error:
        show_error(error)
        return
    environment = [f"{name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())]
    st.markdown(f"**{t('monitor.command')}**")
    st.code(" ".join([*environment, shlex.join(spec.argv)]), language="bash", wrap_lines=True)
    st.json(spec.details, expanded=1)
