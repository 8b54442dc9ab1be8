"""The curves of a run: loss raw and smoothed, learning rate, gradient norm, step time."""

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from core.runs.curves import smooth
from core.runs.metrics import Metrics
from pages.ui.charts import Line, line_chart
from pages.ui.text import t


def run_curves(metrics: Metrics, started_at: float | None) -> None:
    """All curves over iterations or minutes, with the controls of the loss chart above."""
    if not len(metrics):
        st.caption(t("monitor.no_metrics") if started_at is None else t("monitor.starting"))
        return
    axis, smoothing, log = st.columns([1.2, 2, 1], vertical_alignment="bottom", gap="large")
    with axis:
        by_minutes = choose_axis(metrics) == "minutes"
    weight = smoothing.slider(t("monitor.smoothing"), 0.0, 0.99, 0.9, 0.01, key="monitor_smoothing")
    is_log = log.toggle(t("monitor.log_axis"), key="monitor_log_axis")
    x, x_title = x_axis(metrics, by_minutes=by_minutes, started_at=started_at)
    marks = _resumed(metrics, x)
    loss = metrics["loss"]
    line_chart(
        t("monitor.loss"),
        {t("monitor.smoothed"): Line(x, smooth(loss, weight)), t("monitor.raw"): Line(x, loss, is_faint=True)},
        x_title=x_title,
        is_log=is_log,
        marks=marks,
        height=300,
    )
    if metrics.resumed_at:
        st.caption(t("monitor.resumed_at", iterations=", ".join(map(str, metrics.resumed_at))))
    columns = st.columns(3)
    for column, name in zip(columns, ("lr", "grad_norm"), strict=False):
        if metrics.has(name):
            with column:
                line_chart(t(f"monitor.{name}"), {t(f"monitor.{name}"): Line(x, metrics[name])}, x_title=x_title)
    if metrics.has("step_seconds"):
        with columns[2]:
            _step_time(metrics, x, x_title)


def choose_axis(metrics: Metrics) -> str:
    """`steps` or `minutes`; without times there are only steps."""
    if not metrics.has("at"):
        return "steps"
    names = {"steps": t("monitor.step_axis"), "minutes": t("monitor.minutes_axis")}
    chosen = st.segmented_control(
        t("monitor.axis"), list(names), format_func=names.__getitem__, default="steps", key="monitor_axis"
    )
    return str(chosen or "steps")


def x_axis(metrics: Metrics, *, by_minutes: bool, started_at: float | None) -> tuple[NDArray[np.float64], str]:
    """Values and title of the x-axis."""
    if not by_minutes:
        return metrics["iteration"], t("monitor.step_axis")
    origin = min(started_at or np.inf, float(np.nanmin(metrics["at"])))
    return (metrics["at"] - origin) / 60, t("monitor.minutes_axis")


def _step_time(metrics: Metrics, x: NDArray[np.float64], x_title: str) -> None:
    lines = {t("monitor.step_part"): Line(x, metrics["step_seconds"])}
    if metrics.has("data_seconds"):
        lines[t("monitor.data_part")] = Line(x, metrics["data_seconds"])
    line_chart(t("monitor.step_seconds"), lines, x_title=x_title)


def _resumed(metrics: Metrics, x: NDArray[np.float64]) -> list[float]:
    places = np.searchsorted(metrics["iteration"], metrics.resumed_at)
    return [float(x[place]) for place in places if place < len(x)]
