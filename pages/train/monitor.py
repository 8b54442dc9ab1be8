"""Monitor: one training run as it is, live while it runs."""

import streamlit as st

from core.runs.directory import RunDirectory
from core.runs.jobs import list_runs
from core.runs.logs import log_file, read_tail
from core.runs.metrics import Metrics
from core.runs.state import Phase, read_status
from pages.ui import shell
from pages.ui.run_alerts import count_alerts, open_alerts, run_alerts
from pages.ui.run_axes import ChartSettings, chart_settings
from pages.ui.run_curves import run_curves
from pages.ui.run_data import machine_series_of, metrics_of
from pages.ui.run_hardware import run_hardware
from pages.ui.run_header import failure_card, next_steps, run_header
from pages.ui.run_log import run_details, run_log, run_samples, show_lines
from pages.ui.run_memory import memory_line
from pages.ui.run_notices import run_notices
from pages.ui.run_speed import run_speed
from pages.ui.run_timing import run_timing
from pages.ui.text import t

REFRESH_SECONDS = 2.0
VIEWS = ("curves", "hardware", "samples", "log", "alerts", "details")
CHARTS = ("curves", "hardware")


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


def choose_view(run: RunDirectory, metrics: Metrics) -> tuple[str, ChartSettings]:
    """What is shown below the head, and how its charts are drawn."""
    views = {name: t(f"monitor.tab_{name}") for name in VIEWS}
    if count := count_alerts(run):
        views["alerts"] = f"{views['alerts']} ({count})"
    with st.container(horizontal=True, horizontal_alignment="distribute"):
        view = st.segmented_control(
            t("monitor.choose"),
            VIEWS,
            format_func=views.__getitem__,
            default="curves" if len(metrics) else "log",
            key="monitor_view",
            label_visibility="collapsed",
        )
        settings = chart_settings(metrics) if len(metrics) and view in CHARTS else ChartSettings()
    return str(view or "curves"), settings


def live(run: RunDirectory, *, was_active: bool) -> None:
    """Everything that changes while the run goes on."""
    status = read_status(run)
    if was_active and not status.phase.is_active:
        st.rerun()
    metrics = metrics_of(run)
    run_header(run, status, metrics)
    open_alerts(run, status)
    run_notices(run, status)
    if status.phase is Phase.QUEUED:
        return
    if status.phase.is_active and not len(metrics):
        show_lines(read_tail(log_file(run)).lines, has_log=True, height=300)
        return
    failure_card(run, status)
    next_steps(status)
    memory_line(project, run, metrics)
    view, settings = choose_view(run, metrics)
    match view:
        case "hardware":
            run_hardware(machine_series_of(run), metrics, settings, status.started_at)
        case "samples":
            run_samples(project, run)
        case "log":
            run_log(run)
        case "alerts":
            run_alerts(project, run, is_active=status.phase.is_active)
        case "details":
            run_details(run)
        case _:
            run_curves(run, metrics, settings, status.started_at)
    run_speed(project, run, status)
    run_timing(run, status)


project = shell.require_project()
shell.page_header("monitor")
found = {run.id: run for run in reversed(list_runs(project))}
if found:
    chooser, freeze = st.columns([5, 1.2], vertical_alignment="center")
    with chooser:
        run = choose_run(dict(reversed(found.items())))
    is_active = read_status(run).phase.is_active
    is_frozen = is_active and freeze.toggle(t("monitor.freeze"), key="monitor_freeze", help=t("monitor.freeze_help"))
    every = REFRESH_SECONDS if is_active and not is_frozen else None
    st.fragment(live, run_every=every)(run, was_active=is_active)
else:
    shell.missing(t("monitor.empty"), "launch")
