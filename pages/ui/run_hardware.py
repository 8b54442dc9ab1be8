"""What the machine did during a run: each GPU, CPU, memory, disk and network, on the axes of the loss."""

from collections.abc import Mapping
from typing import Final

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from core.runs.machine import MachineSeries, energy_kwh
from core.runs.metrics import Metrics
from pages.ui.charts import Line, line_chart
from pages.ui.run_axes import ChartSettings, minutes_of
from pages.ui.text import t

_GPU_CHARTS: Final = (
    ("gpu_utilization", "utilization_percent", 1.0),
    ("gpu_memory", "memory_used_bytes", 2**30),
    ("gpu_power", "power_watts", 1.0),
    ("gpu_temperature", "temperature_celsius", 1.0),
    ("gpu_clock", "sm_clock_mhz", 1.0),
    ("gpu_throttled", "throttle_reasons", 1.0),
)
_MACHINE_CHARTS: Final = (
    ("cpu", 1.0, (("machine", "cpu_percent"), ("this_run", "run_cpu_percent"))),
    ("ram", 2**30, (("machine", "ram_used_bytes"), ("this_run", "run_ram_bytes"))),
    ("disk", 2**20, (("disk_read", "disk_read_bytes_per_second"), ("disk_write", "disk_write_bytes_per_second"))),
    ("network", 2**20, (("net_receive", "net_receive_bytes_per_second"), ("net_send", "net_send_bytes_per_second"))),
    ("disk_free", 2**30, (("disk_free", "disk_free_bytes"),)),
)
_SLOWED: Final = 0x8 | 0x20 | 0x40 | 0x80
"""nvml.h: hardware slowdown, thermal (software, hardware), power brake. A power cap is the usual limit of a busy card."""
_CHART_POINTS: Final = 900
_FROM_ZERO: Final = ("gpu_utilization", "gpu_memory", "gpu_throttled", "cpu", "ram", "disk", "network")
Values = NDArray[np.float64]


def run_hardware(series: MachineSeries, metrics: Metrics, settings: ChartSettings, started_at: float | None) -> None:
    """Charts of all sensors that answered, two in a row."""
    if not len(series):
        st.caption(t("monitor.no_hardware"))
        return
    by_steps = len(metrics) > 1 and metrics.has("at") and not settings.by_minutes
    if series.gpus:
        total = sum(energy_kwh(series, gpu) for gpu in series.gpus)
        st.caption(t("monitor.energy", kwh=f"{total:.2f}", count=len(series.gpus)))
    else:
        st.caption(t("monitor.no_gpu"))
    x_title = t("monitor.step_axis") if by_steps else t("monitor.minutes_axis")
    columns = st.columns(2)
    for number, (name, lines) in enumerate(_charts(series)):
        placed = {label: _line(at, y, metrics, started_at, by_steps=by_steps) for label, (at, y) in lines.items()}
        with columns[number % 2]:
            line_chart(
                t(f"monitor.{name}"),
                placed,
                x_title=x_title,
                height=180,
                max_points=_CHART_POINTS,
                from_zero=name in _FROM_ZERO,
                key=f"monitor_hardware_{name}",
            )


def _charts(series: MachineSeries) -> list[tuple[str, Mapping[str, tuple[Values, Values]]]]:
    charts: list[tuple[str, dict[str, tuple[Values, Values]]]] = []
    for name, field, unit in _GPU_CHARTS:
        lines = {gpu: (columns["at"], _in_unit(name, columns[field], unit)) for gpu, columns in series.gpus.items()}
        charts.append((name, lines))
    for name, unit, fields in _MACHINE_CHARTS:
        charts.append(
            (name, {t(f"monitor.{label}"): (series.at, series.machine[field] / unit) for label, field in fields})
        )
    answered = [(name, {k: v for k, v in lines.items() if np.isfinite(v[1]).any()}) for name, lines in charts]
    return [(name, lines) for name, lines in answered if lines]


def _in_unit(name: str, values: Values, unit: float) -> Values:
    if name != "gpu_throttled":
        return values / unit
    known = np.isfinite(values)
    return np.where(known, (np.where(known, values, 0).astype(np.int64) & _SLOWED) != 0, np.nan)


def _line(at: Values, values: Values, metrics: Metrics, started_at: float | None, *, by_steps: bool) -> Line:
    """Over minutes since the start, or over the iteration that was reached at that time."""
    if by_steps:
        reached = np.maximum.accumulate(metrics["at"])  # a clock that is set back does not go back in steps
        return Line(np.interp(at, reached, metrics["iteration"], left=np.nan), values)
    return Line(minutes_of(at, metrics, started_at), values)
