"""What a person can do to a run: stop and save, cancel, go on at the same step, start once more."""

import streamlit as st

from core.errors import DanluError
from core.runs.again import go_on, resume_point, retry
from core.runs.control import is_stoppable, request_stop
from core.runs.directory import RunDirectory
from core.runs.state import Phase, RunStatus
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.run_data import spec_of
from pages.ui.text import show_error, t

_RESUMABLE = (Phase.STOPPED, Phase.CANCELLED, Phase.FAILED, Phase.LOST)


def run_buttons(run: RunDirectory, status: RunStatus) -> None:
    """The buttons that make sense now, in one row."""
    with st.container(horizontal=True, horizontal_alignment="right", gap="small"):
        if is_stoppable(run, status.phase):
            _stop_buttons(run, status)
        elif run.spec_file.exists() and not status.phase.is_active:
            _start_buttons(run, status)


def _stop_buttons(run: RunDirectory, status: RunStatus) -> None:
    if status.phase is not Phase.QUEUED and st.button(
        t("monitor.stop_save"),
        key="monitor_stop_save",
        icon=":material/save:",
        help=t("monitor.stop_save_help"),
        disabled=status.phase is Phase.STOPPING or status.stop_mode is not None,
    ):
        _ask(run, "save")
    if st.button(t("monitor.cancel"), key="monitor_cancel", disabled=status.stop_mode == "cancel"):
        _confirm_cancel(run)


def _start_buttons(run: RunDirectory, status: RunStatus) -> None:
    spec = spec_of(run)
    if spec is None or spec.kind != "train":
        return
    card = resume_point(run) if status.phase in _RESUMABLE else None
    if card is not None and st.button(
        t("monitor.go_on", iteration=card.iteration),
        key="monitor_go_on",
        icon=":material/play_arrow:",
        type="primary",
        help=t("monitor.go_on_help"),
    ):
        _go_on(run)
    if st.button(t("monitor.retry"), key="monitor_retry", icon=":material/replay:", help=t("monitor.retry_help")):
        _retry(run)


def _go_on(run: RunDirectory) -> None:
    try:
        go_on(run)
        note("resume", run.id)
    except DanluError as error:
        show_error(error)
        return
    st.rerun()


def _retry(run: RunDirectory) -> None:
    try:
        again = retry(shell.require_project(), run)
        note("start", again.id)
    except DanluError as error:
        show_error(error)
        return
    st.switch_page(shell.PAGES["monitor"], query_params={"run": again.id})


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
        note("cancel" if mode == "cancel" else "stop", run.id)
    except DanluError as error:
        show_error(error)
