"""Monitor: one training run as it is, live while it runs."""

import streamlit as st

from core.runs.directory import RunDirectory
from core.runs.jobs import list_runs
from core.runs.logs import log_file, read_tail
from core.runs.state import read_status
from pages.ui import shell
from pages.ui.run_curves import run_curves
from pages.ui.run_data import machine_samples_of, metrics_of
from pages.ui.run_hardware import run_hardware
from pages.ui.run_header import failure_card, next_steps, run_header
from pages.ui.run_log import run_details, run_log, run_samples, show_lines
from pages.ui.text import t

REFRESH_SECONDS = 2.0
VIEWS = ("curves", "hardware", "samples", "log", "details")


def choose_run(runs: dict[str, RunDirectory]) -> RunDirectory:
    """The run in the URL, else the one chosen before, else the latest; the URL follows the choice."""
    asked = st.query_params.get("run")
    if asked in runs and asked != st.session_state.get("monitor_asked"):
        st.session_state["monitor_run"] = asked
    if st.session_state.get("monitor_run") not in runs:
        st.session_state["monitor_run"] = next(iter(runs))
    chosen = str(st.selectbox(t("monitor.choose"), list(runs), key="monitor_run", label_visibility="collapsed"))
    st.session_state["monitor_asked"] = chosen
    if asked != chosen:
        st.query_params["run"] = chosen
    return runs[chosen]


def live(run: RunDirectory, *, was_active: bool) -> None:
    """Everything that changes while the run goes on."""
    status = read_status(run)
    if was_active and not status.phase.is_active:
        st.rerun()
    metrics = metrics_of(run)
    run_header(run, status, metrics)
    if status.phase.is_active and not len(metrics):
        show_lines(read_tail(log_file(run)).lines, has_log=True, height=300)
        return
    failure_card(run, status)
    next_steps(status)
    views = {name: t(f"monitor.tab_{name}") for name in VIEWS}
    view = st.segmented_control(
        t("monitor.choose"),
        VIEWS,
        format_func=views.__getitem__,
        default="curves" if len(metrics) else "log",
        key="monitor_view",
        label_visibility="collapsed",
    )
    match view:
        case "hardware":
            run_hardware(machine_samples_of(run), metrics, status.started_at)
        case "samples":
            run_samples(run)
        case "log":
            run_log(run)
        case "details":
            run_details(run)
        case _:
            run_curves(metrics, status.started_at)


project = shell.require_project()
shell.page_header("monitor")
found = {run.id: run for run in reversed(list_runs(project))}
if found:
    run = choose_run(dict(reversed(found.items())))
    is_active = read_status(run).phase.is_active
    st.fragment(live, run_every=REFRESH_SECONDS if is_active else None)(run, was_active=is_active)
else:
    shell.missing(t("monitor.empty"), "launch")
