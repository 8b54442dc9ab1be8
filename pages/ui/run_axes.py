"""How the charts of a run are drawn: what the x-axis counts, how many steps are shown, smoothing, scale."""

from dataclasses import dataclass, field

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from core.runs.metrics import Metrics
from pages.ui.charts import Line, Mark
from pages.ui.text import t

_WINDOWS = (0, 1000, 200)
"""Steps shown, from the end; 0: all."""


@dataclass(frozen=True)
class ChartSettings:
    """What a person chose; the same for all charts of a run."""

    by_minutes: bool = False
    steps: int = 0
    smoothing: float = 0.9
    is_log: bool = False


@dataclass(frozen=True)
class Axis:
    """The x-axis: a value for each step, its title, and what happened on it."""

    x: NDArray[np.float64]
    title: str
    first: int = 0
    """Row from which on steps are shown."""
    marks: list[Mark] = field(default_factory=list)

    def line(self, values: NDArray[np.float64], *, is_faint: bool = False) -> Line:
        return Line(self.x[self.first :], values[self.first :], is_faint=is_faint)

    @property
    def shown_marks(self) -> list[Mark]:
        return [mark for mark in self.marks if len(self.x) and mark.x >= self.x[self.first]]


def chart_settings(metrics: Metrics) -> ChartSettings:
    """A button that opens the settings."""
    axes = {"steps": t("monitor.step_axis")} | ({"minutes": t("monitor.minutes_axis")} if metrics.has("at") else {})
    with st.popover(t("monitor.axes"), icon=":material/tune:", key="monitor_axes"):
        axis = st.segmented_control(
            t("monitor.axis"), list(axes), format_func=axes.__getitem__, default="steps", key="monitor_axis"
        )
        steps = st.segmented_control(
            t("monitor.window"),
            _WINDOWS,
            format_func=lambda count: t("monitor.last_steps", count=f"{count:,}") if count else t("monitor.all_steps"),
            default=0,
            key="monitor_window",
        )
        smoothing = st.slider(
            t("monitor.smoothing"), 0.0, 0.99, 0.9, 0.01, key="monitor_smoothing", help=t("monitor.smoothing_help")
        )
        is_log = st.toggle(t("monitor.log_axis"), key="monitor_log_axis")
    return ChartSettings(axis == "minutes", int(steps or 0), smoothing, is_log)


def axis_of(metrics: Metrics, settings: ChartSettings, started_at: float | None, marks: list[Mark]) -> Axis:
    """The axis for curves with one value a step. `marks` are over iterations."""
    first = max(0, len(metrics) - settings.steps) if settings.steps else 0
    if not settings.by_minutes:
        return Axis(metrics["iteration"], t("monitor.step_axis"), first, marks)
    minutes = minutes_of(metrics["at"], metrics, started_at)
    places = np.interp([mark.x for mark in marks], metrics["iteration"], minutes)
    moved = [Mark(float(place), mark.label, mark.colour) for place, mark in zip(places, marks, strict=True)]
    return Axis(minutes, t("monitor.minutes_axis"), first, moved)


def minutes_of(at: NDArray[np.float64], metrics: Metrics, started_at: float | None) -> NDArray[np.float64]:
    """Unix seconds as minutes since the first step, or since the start if that was earlier."""
    first_step = float(np.nanmin(metrics["at"])) if metrics.has("at") else np.inf
    return (at - min(started_at or np.inf, first_step, float(at[0]))) / 60
