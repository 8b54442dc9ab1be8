"""The head of the monitor: where a run stands, how far it is, and the buttons that stop it."""

import time

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from core.errors import DanluError
from core.runs.control import is_stoppable, request_stop
from core.runs.directory import RunDirectory
from core.runs.failure import explain_failure
from core.runs.metrics import Metrics
from core.runs.progress import TrainProgress, measure
from core.runs.state import Phase, RunStatus
from pages.ui import shell
from pages.ui.text import duration, say, show_error, t

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
_UNKNOWN = "–"


def run_header(run: RunDirectory, status: RunStatus, metrics: Metrics) -> None:
    """Badge, buttons, progress and the figures of now."""
    progress = measure(metrics, status.started_at)
    left, save, cancel = st.columns([4, 1.3, 1], vertical_alignment="center")
    with left:
        st.badge(t(f"runs.phases.{status.phase}"), color=_COLOURS[status.phase])
    if is_stoppable(run, status.phase):
        _stop_buttons(run, status, save, cancel)
    _notes(run, status, metrics)
    _progress_bar(status, progress)
    if len(metrics):
        _figures(status, progress)


def failure_card(run: RunDirectory, status: RunStatus) -> None:
    """In plain words why it failed, with the decisive lines; nothing if it did not."""
    failure = explain_failure(run, status)
    if failure is None:
        return
    st.error(f"**{say(failure.what)}**\n\n{say(failure.next)}", icon=":material/error:")
    if failure.evidence:
        st.caption(t("monitor.failure_lines"))
        st.code("\n".join(failure.evidence), language=None, wrap_lines=True)


def next_steps(status: RunStatus) -> None:
    """The way on from a run that has something to deliver."""
    if status.phase not in (Phase.FINISHED, Phase.STOPPED):
        return
    text, export, chat = st.columns([2, 1, 1], vertical_alignment="center")
    text.markdown(t("monitor.finished_next"))
    for column, page in ((export, "export"), (chat, "chat")):
        column.page_link(shell.PAGES[page], label=t(f"shell.pages.{page}"), icon=shell.ICONS[page])


def _stop_buttons(run: RunDirectory, status: RunStatus, save: DeltaGenerator, cancel: DeltaGenerator) -> None:
    if save.button(
        t("monitor.stop_save"),
        key="monitor_stop_save",
        icon=":material/save:",
        disabled=status.phase is Phase.STOPPING or status.stop_mode is not None,
        width="stretch",
    ):
        _ask(run, "save")
    if cancel.button(t("monitor.cancel"), key="monitor_cancel", disabled=status.stop_mode == "cancel", width="stretch"):
        _confirm_cancel(run)


def _confirm_cancel(run: RunDirectory) -> None:
    @st.dialog(t("monitor.cancel_title"))
    def confirm() -> None:
        st.markdown(t("monitor.cancel_body", run=run.id))
        no, yes = st.columns(2)
        if no.button(t("monitor.cancel_no"), key="monitor_cancel_no", width="stretch"):
            st.rerun()
        if yes.button(t("monitor.cancel_yes"), key="monitor_cancel_yes", type="primary", width="stretch"):
            _ask(run, "cancel")
            st.rerun()

    confirm()


def _ask(run: RunDirectory, mode: str) -> None:
    try:
        request_stop(run, "cancel" if mode == "cancel" else "save")
    except DanluError as error:
        show_error(error)


def _notes(run: RunDirectory, status: RunStatus, metrics: Metrics) -> None:
    if status.phase.is_active and not run.spec_file.exists():
        st.info(t("monitor.read_only"), icon=":material/visibility:")
    elif status.phase.is_active and not status.is_supervised:
        st.warning(t("monitor.unsupervised"), icon=":material/warning:")
    if status.phase is Phase.STOPPING or (status.phase.is_active and run.stop_file.exists()):
        st.info(t("monitor.stop_sent"), icon=":material/save:")
    elif status.phase.is_active and not len(metrics):
        st.info(t("monitor.starting"), icon=":material/hourglass_top:")


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
    elapsed = status.elapsed_seconds(time.time())
    iteration = f"{progress.iteration:,} / {total:,}" if total else f"{progress.iteration:,}"
    figures = (
        (t("monitor.iteration"), iteration),
        (t("monitor.loss"), _UNKNOWN if progress.loss is None else f"{progress.loss:.4f}"),
        (t("monitor.speed"), _UNKNOWN if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}"),
        (t("monitor.elapsed"), _UNKNOWN if elapsed is None else duration(elapsed)),
    )
    for column, (label, value) in zip(st.columns(len(figures)), figures, strict=True):
        column.caption(label)
        column.markdown(f"#### {value}")
