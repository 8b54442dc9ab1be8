"""What the machine did during a run: each GPU, or CPU and memory where there is none, on the axes of the loss."""

from typing import Any

import numpy as np
import streamlit as st

from core.runs.metrics import Metrics
from core.runs.samples import gpu_series, machine_series
from pages.ui.charts import Line, line_chart
from pages.ui.run_curves import choose_axis
from pages.ui.text import t

_GPU_CHARTS = (
    ("gpu_utilization", "utilization_percent", 1.0),
    ("gpu_memory", "memory_used_bytes", 2**30),
    ("gpu_power", "power_watts", 1.0),
    ("gpu_temperature", "temperature_celsius", 1.0),
)
_MACHINE_CHARTS = (
    ("cpu", 1.0, (("machine", "cpu_percent"), ("this_run", "run_cpu_percent"))),
    ("ram", 2**30, (("machine", "ram_used_bytes"), ("this_run", "run_ram_bytes"))),
    ("disk", 2**20, (("disk_read", "disk_read_bytes_per_second"), ("disk_write", "disk_write_bytes_per_second"))),
    ("network", 2**20, (("net_receive", "net_receive_bytes_per_second"), ("net_send", "net_send_bytes_per_second"))),
)
Points = list[tuple[float, float]]


def run_hardware(samples: list[dict[str, Any]], metrics: Metrics, started_at: float | None) -> None:
    """Charts of all sensors that answered, two in a row."""
    if not samples:
        st.caption(t("monitor.no_hardware"))
        return
    by_steps = len(metrics) > 1 and choose_axis(metrics) == "steps"
    charts = _charts(samples)
    if not any(sample.get("gpus") for sample in samples):
        st.caption(t("monitor.no_gpu"))
    columns = st.columns(2)
    for number, (name, series) in enumerate(charts):
        lines = {label: _line(points, metrics, started_at, by_steps=by_steps) for label, points in series.items()}
        x_title = t("monitor.step_axis") if by_steps else t("monitor.minutes_axis")
        with columns[number % 2]:
            line_chart(t(f"monitor.{name}"), lines, x_title=x_title, height=180)


def _charts(samples: list[dict[str, Any]]) -> list[tuple[str, dict[str, Points]]]:
    charts: list[tuple[str, dict[str, Points]]] = []
    for name, field, unit in _GPU_CHARTS:
        series = gpu_series(samples, field)
        charts.append((name, {label: _scaled(points, unit) for label, points in series.items()}))
    for name, unit, fields in _MACHINE_CHARTS:
        rows = {t(f"monitor.{label}"): machine_series(samples, field) for label, field in fields}
        charts.append((name, {label: _scaled(points, unit) for label, points in rows.items() if points}))
    return [(name, series) for name, series in charts if series]


def _line(points: Points, metrics: Metrics, started_at: float | None, *, by_steps: bool) -> Line:
    """Over minutes since the start, or over the iteration that was reached at that time."""
    at, values = np.array(points, dtype=np.float64).T
    if by_steps:
        return Line(np.interp(at, metrics["at"], metrics["iteration"], left=np.nan), values)
    return Line((at - min(started_at or np.inf, at[0])) / 60, values)


def _scaled(points: Points, unit: float) -> Points:
    return [(at, value / unit) for at, value in points]
