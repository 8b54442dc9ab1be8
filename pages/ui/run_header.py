"""The head of the monitor: where a run stands, how far it is, and why it failed."""

import time

import streamlit as st

from core.runs.directory import RunDirectory
from core.runs.failure import Failure, explain_failure
from core.runs.metrics import Metrics
from core.runs.progress import TrainProgress, measure
from core.runs.state import Phase, RunStatus
from core.runs.validation import Validated, best_of, early_end, is_validating
from pages.ui import shell
from pages.ui.run_actions import run_buttons
from pages.ui.run_cluster import cluster_note
from pages.ui.run_data import spec_of
from pages.ui.run_tokenising import tokenising_note
from pages.ui.run_waiting import waiting_note
from pages.ui.text import duration, gib, say, t

_COLOURS = {
    Phase.QUEUED: "gray",
    Phase.STARTING: "blue",
    Phase.RUNNING: "blue",
    Phase.STOPPING: "orange",
    Phase.FINISHED: "green",
    Phase.STOPPED: "green",
    Phase.CANCELLED: "gray",
    Phase.FAILED: "red",
    Phase.LOST: "red",
}
_OUT_OF_MEMORY = ("cuda_oom", "train.errors.out_of_memory.what")

_NOTED_AFTER_SECONDS = 4.0
"""A validation that is over sooner is not worth a line that comes and goes."""


def run_header(run: RunDirectory, status: RunStatus, metrics: Metrics) -> None:
    """Badge, progress, buttons and the figures of now."""
    progress = measure(metrics, status.started_at)
    badge, bar, buttons = st.columns([1.1, 4, 3.2], vertical_alignment="center")
    with badge:
        st.badge(t(f"runs.phases.{status.phase}"), color=_COLOURS[status.phase])
    with bar:
        _progress_bar(status, progress)
    with buttons:
        run_buttons(run, status)
    if len(metrics):
        _figures(status, progress)
    cluster_note(run, status)
    _notes(run, status, metrics)


def failure_card(run: RunDirectory, status: RunStatus) -> None:
    """In plain words why it failed, with the decisive lines and the way to mend it; nothing if it did not."""
    failure = explain_failure(run, status)
    if failure is None:
        return
    st.error(f"**{say(failure.what)}**\n\n{say(failure.next)}", icon=":material/error:")
    if failure.cause in _OUT_OF_MEMORY or failure.what.key in _OUT_OF_MEMORY:
        _mend_memory(run)
    if failure.evidence:
        _evidence(failure)


def next_steps(status: RunStatus) -> None:
    """The way on from a run that has something to deliver."""
    if status.phase not in (Phase.FINISHED, Phase.STOPPED):
        return
    text, export, chat = st.columns([2, 1, 1], vertical_alignment="center")
    text.markdown(t("monitor.finished_next"))
    for column, page in ((export, "export"), (chat, "chat")):
        column.page_link(shell.PAGES[page], label=t(f"shell.pages.{page}"), icon=shell.ICONS[page])


def _mend_memory(run: RunDirectory) -> None:
    """The launch page knows what would fit, changes the config at a click, and starts or resumes from there."""
    spec = spec_of(run)
    text, fit = st.columns([3, 1.3], vertical_alignment="center")
    text.markdown(t("monitor.mend_memory"))
    if fit.button(t("monitor.make_it_fit"), key="monitor_fit", icon=":material/fit_screen:", width="stretch"):
        name = spec.details.get("config", {}).get("name") if spec else None
        if name and (shell.require_project().config / f"{name}.py").exists():
            st.session_state["launch_config"] = name
        st.switch_page(shell.PAGES["launch"])


def _evidence(failure: Failure) -> None:
    st.caption(t("monitor.failure_lines"))
    st.code("\n".join(failure.evidence), language=None, wrap_lines=True)


def _notes(run: RunDirectory, status: RunStatus, metrics: Metrics) -> None:
    if status.phase.is_active and not run.spec_file.exists():
        st.info(t("monitor.read_only"), icon=":material/visibility:")
    elif status.phase.is_active and not status.is_supervised:
        st.warning(t("monitor.unsupervised"), icon=":material/warning:")
    if status.stop_reason is not None:
        st.warning(t("health.stopped_by", what=t(f"health.kinds.{status.stop_reason}")), icon=":material/front_hand:")
    if status.phase is Phase.FINISHED and (end := early_end(run)):
        st.success(_early(run, end), icon=":material/flag:")
    if status.gpu_bytes_left:
        st.warning(t("monitor.memory_left", size=gib(status.gpu_bytes_left)), icon=":material/memory:")
    if status.phase is Phase.QUEUED:
        waiting_note(status)
    elif status.phase is Phase.STOPPING or (status.phase.is_active and run.stop_file.exists()):
        st.info(t("monitor.stop_sent"), icon=":material/save:")
    elif status.phase is Phase.RUNNING and is_validating(run, time.time() - _NOTED_AFTER_SECONDS):
        st.info(t("monitor.validating"), icon=":material/fact_check:")
    elif status.phase.is_active and not len(metrics) and not tokenising_note(run):
        st.info(t("monitor.starting"), icon=":material/hourglass_top:")


def _early(run: RunDirectory, end: Validated) -> str:
    """Why it ended before its planned end, and which checkpoint to take."""
    best = best_of(run)
    said = t("monitor.ended_early", iteration=f"{end.iteration:,}", patience=end.patience)
    if best is None:
        return said
    key = "monitor.early_best" if best.checkpoint else "monitor.early_best_unsaved"
    return f"{said} {t(key, iteration=f'{best.iteration:,}', loss=f'{best.loss:.4f}')}"


def _progress_bar(status: RunStatus, progress: TrainProgress) -> None:
    fraction = progress.fraction
    if fraction is None:
        return
    percent = f"{100 * fraction:.1f}"
    if status.phase.is_active and progress.remaining_seconds is not None:
        st.progress(fraction, text=t("monitor.progress", percent=percent, left=duration(progress.remaining_seconds)))
    else:
        st.progress(fraction, text=f"{percent} %")


def _figures(status: RunStatus, progress: TrainProgress) -> None:
    total = progress.total_iterations
    elapsed = status.total_seconds(time.time())
    figures = {
        "monitor.iteration": f"{progress.iteration:,} / {total:,}" if total else f"{progress.iteration:,}",
        "runs.columns.loss": None if progress.loss is None else f"{progress.loss:.4f}",
        "monitor.recent_speed": None if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}",
        "runs.columns.duration": None if elapsed is None else duration(elapsed),
    }
    shown = [f"{t(name)} &nbsp;**{value}**" for name, value in figures.items() if value is not None]
    st.markdown(" &emsp;&emsp; ".join(shown), help=t("monitor.figures_help"))
