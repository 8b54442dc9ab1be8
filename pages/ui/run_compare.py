"""Runs over each other: loss by step, tokens or time, and everything in which their settings differ."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from core.errors import DanluError
from core.i18n import catalog
from core.project import Project
from core.runs.bundle import write_bundle
from core.runs.compare import Difference, differences
from core.runs.curves import smooth
from core.runs.directory import RunDirectory
from core.runs.metrics import Metrics
from core.runs.summary import RunSummary
from core.runs.tensorboard import write_events
from core.runs.validation import read_validation
from pages.ui.audit import note
from pages.ui.charts import Line, line_chart
from pages.ui.run_data import metrics_of
from pages.ui.text import language, show_error, t

_AXES = ("steps", "tokens", "minutes")
_MOST_RUNS = 8


def compare_losses(rows: list[RunSummary]) -> None:
    """Smoothed loss of each run in one chart."""
    axis, smoothing, log = st.columns([2, 2, 1], vertical_alignment="bottom", gap="large")
    by = axis.segmented_control(
        t("monitor.axis"), _AXES, format_func=lambda name: t(f"runs.axes.{name}"), default="steps", key="runs_axis"
    )
    weight = smoothing.slider(
        t("monitor.smoothing"), 0.0, 0.99, 0.9, 0.01, key="runs_smoothing", help=t("monitor.smoothing_help")
    )
    is_log = log.toggle(t("monitor.log_axis"), key="runs_log_axis")
    lines = {}
    for row in rows[:_MOST_RUNS]:
        metrics = metrics_of(row.run)
        x = _x(metrics, by or "steps") if len(metrics) else None
        if x is not None and metrics.has("loss"):
            lines[row.run.id] = Line(x, smooth(metrics["loss"], weight))
    if lines:
        title = t(f"runs.axes.{by or 'steps'}")
        line_chart(t("runs.compare"), lines, x_title=title, is_log=is_log, height=320, key="runs_compare")
    else:
        st.caption(t("runs.compare_empty"))


def compare_settings(rows: list[RunSummary]) -> None:
    """What is not the same, one row a setting and one column a run."""
    found = differences([row.run for row in rows])
    st.markdown(f"**{t('runs.differences')}**")
    if not found:
        st.caption(t("runs.no_differences"))
        return
    table = pd.DataFrame(
        [[t(f"runs.groups.{each.group}"), _label(each), *each.values] for each in found],
        columns=[t("runs.group"), t("runs.setting"), *[row.run.id for row in rows]],
    )
    st.dataframe(table, hide_index=True, width="stretch", key="runs_differences")


def downloads(project: Project, run: RunDirectory) -> None:
    """The bundle of a run, and its curves for TensorBoard; made when asked for."""
    folder = project.private / "exports"
    with st.popover(t("runs.download"), icon=":material/download:", key="runs_download"):
        st.caption(t("runs.bundle_help"))
        _offer("bundle", f"{run.id}.zip", lambda: write_bundle(run, folder / f"{run.id}.zip"))
        st.caption(t("runs.events_help"))
        name = f"events.out.tfevents.{run.id}"
        _offer("events", name, lambda: write_events(metrics_of(run), folder / name, read_validation(run)))


def _offer(kind: str, name: str, make: Callable[[], Path]) -> None:
    if st.button(t(f"runs.make_{kind}"), key=f"runs_make_{kind}"):
        try:
            st.session_state[f"runs_made_{kind}"] = str(make())
            note("export", name)
        except DanluError as error:
            show_error(error)
            return
    made = Path(st.session_state.get(f"runs_made_{kind}", "."))
    if made.name == name and made.is_file():
        st.download_button(
            t("runs.download_file", name=name),
            made.read_bytes,
            file_name=name,
            key=f"runs_get_{kind}",
            on_click="ignore",
        )


def _x(metrics: Metrics, by: str) -> np.ndarray | None:
    if by == "minutes":
        return (metrics["at"] - np.nanmin(metrics["at"])) / 60 if metrics.has("at") else None
    if by == "tokens":
        return np.nancumsum(metrics["tokens"]) if metrics.has("tokens") else None
    return metrics["iteration"]


def _label(difference: Difference) -> str:
    known = catalog(language()).sentences
    keys = (f"config.fields.{difference.name}.label", f"runs.facts.{difference.name}")
    return next((known[key] for key in keys if key in known), difference.name)
