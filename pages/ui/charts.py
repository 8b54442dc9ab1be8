"""Line charts in one style, with zoom, crosshair and labelled marks. Knows points and words, not what they measure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from core.runs.curves import downsample

HEIGHT_PIXELS = 220
MAX_POINTS = 1600
SMALL_POINTS = 400
"""For charts that share a row: they have no pixels for more, and every refresh sends them all."""
COLOURS = ("#C2410C", "#0F766E", "#6D28D9", "#B45309", "#0369A1", "#BE123C", "#4D7C0F", "#475569")
_GREY = "#A8A29E"


@dataclass(frozen=True)
class Line:
    """One line of a chart: values over x, of equal length."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    is_faint: bool = False
    is_dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """An upright line at x with a word to it."""

    x: float
    label: str
    colour: str = _GREY


def line_chart(
    title: str,
    lines: Mapping[str, Line],
    *,
    x_title: str,
    is_log: bool = False,
    marks: Sequence[Mark] = (),
    height: int = HEIGHT_PIXELS,
    max_points: int = MAX_POINTS,
    from_zero: bool = False,
    key: str | None = None,
) -> None:
    """Draw `lines` by name, at most `max_points` in all with every extreme kept. The wheel zooms, dragging moves."""
    st.markdown(f"**{title}**")
    has_legend = len(lines) > 1
    share = max_points // max(1, len(lines))
    series = [_series(name, line, is_log, share, number) for number, (name, line) in enumerate(lines.items())]
    if series and marks:
        series[0]["markLine"] = _mark_line(marks)
    st.echarts_chart(
        {
            "animation": False,
            "grid": {
                "left": 8,
                "right": 20,
                "top": 30 if has_legend or marks else 12,
                "bottom": 26,
                "containLabel": True,
            },
            "legend": {"show": has_legend, "top": 0, "left": 0, "itemWidth": 14, "itemHeight": 8},
            "tooltip": {
                "trigger": "axis",
                "confine": True,
                "axisPointer": {"type": "cross", "label": {"precision": 4}},
                "valueFormatter": "%.5g",
            },
            "xAxis": {
                "type": "value",
                "name": x_title,
                "nameLocation": "middle",
                "nameGap": 24,
                "min": _first_x(lines),
                "max": "dataMax",
                "splitLine": {"show": False},
                "axisLabel": {"hideOverlap": True, "showMaxLabel": False},
            },
            "yAxis": {
                "type": "log" if is_log else "value",
                "scale": not from_zero,
                "splitNumber": 4,
                "axisLabel": {"hideOverlap": True},
            },
            "dataZoom": [{"type": "inside", "filterMode": "filter", "moveOnMouseMove": True}],
            "series": series,
        },
        height=height,
        key=key,
        alt=title,
    )


def _first_x(lines: Mapping[str, Line]) -> float | str:
    """A whole number at or below the first value: a label such as 4.000838 helps nobody."""
    firsts = [float(np.nanmin(line.x)) for line in lines.values() if np.isfinite(line.x).any()]
    return math.floor(min(firsts)) if firsts else "dataMin"


def _series(name: str, line: Line, is_log: bool, max_points: int, number: int) -> dict[str, Any]:
    y = np.where(line.y > 0, line.y, np.nan) if is_log else line.y
    is_placed = np.isfinite(line.x)
    chosen = downsample(y if is_placed.all() else np.where(is_placed, y, np.nan), max_points)
    points = np.column_stack([line.x[chosen], y[chosen]])
    return {
        "name": name,
        "type": "line",
        "showSymbol": len(chosen) < 25,
        "symbolSize": 5,
        "color": COLOURS[number % len(COLOURS)],
        "z": 2 if line.is_faint else 3,
        "lineStyle": {
            "width": 1 if line.is_faint else 1.8,
            "opacity": 0.35 if line.is_faint else 1,
            "type": "dashed" if line.is_dashed else "solid",
        },
        # Six digits are more than a screen shows, and half of what a float prints.
        "data": [[float(f"{x:.7g}"), float(f"{value:.6g}")] for x, value in points.tolist()],
    }


def _mark_line(marks: Sequence[Mark]) -> dict[str, Any]:
    return {
        "symbol": "none",
        "silent": False,
        "animation": False,
        "label": {"show": True, "formatter": "{b}", "position": "end", "fontSize": 10, "color": "inherit"},
        "data": [
            {
                "xAxis": mark.x,
                "name": mark.label,
                "lineStyle": {"color": mark.colour, "type": "dashed", "width": 1},
                "label": {"color": mark.colour},
            }
            for mark in marks
        ],
    }
