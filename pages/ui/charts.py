"""Line charts in one style. Knows points and words, not what they measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
from numpy.typing import NDArray

from core.runs.curves import downsample

HEIGHT_PIXELS = 220
MAX_POINTS = 1000
_COLOURS = ("#C2410C", "#0F766E", "#6D28D9", "#B45309", "#0369A1", "#BE123C", "#4D7C0F", "#475569")


@dataclass(frozen=True)
class Line:
    """One line of a chart: values over x, of equal length."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    is_faint: bool = False


def line_chart(
    title: str,
    lines: Mapping[str, Line],
    *,
    x_title: str,
    is_log: bool = False,
    marks: Sequence[float] = (),
    height: int = HEIGHT_PIXELS,
) -> None:
    """Draw `lines` by name, at most 1000 points each with every extreme kept; `marks` are upright lines at x."""
    frame = pd.concat([_frame(name, line, is_log) for name, line in lines.items()], ignore_index=True)
    names = list(lines)
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(grid=False, tickMinStep=1))
    kind = "log" if is_log else "linear"
    y = alt.Y("y:Q", title=None, scale=alt.Scale(type=kind, zero=False), axis=alt.Axis(tickCount=5))
    colours = alt.Scale(domain=names, range=[_COLOURS[n % len(_COLOURS)] for n in range(len(names))])
    legend = alt.Legend(title=None, orient="top", direction="horizontal", labelLimit=300) if len(names) > 1 else None
    faint = alt.condition("datum.is_faint", alt.value(0.3), alt.value(1.0))
    chart = (
        alt.Chart(frame)
        .mark_line(strokeWidth=1.6, clip=True, point={"size": 18, "filled": True} if len(frame) < 40 else False)
        .encode(
            x=x,
            y=y,
            color=alt.Color("name:N", scale=colours, legend=legend),
            opacity=faint,
            tooltip=[
                alt.Tooltip("name:N", title=title),
                alt.Tooltip("x:Q", title=x_title, format=",.6~g"),
                alt.Tooltip("y:Q", title=title, format=".5~g"),
            ],
        )
        .interactive(bind_y=False)
    )
    layers = [chart]
    if marks:
        rules = alt.Chart(pd.DataFrame({"x": list(marks)})).mark_rule(strokeDash=[4, 4], color="#78716C")
        layers.append(rules.encode(x="x:Q"))
    st.markdown(f"**{title}**")
    st.altair_chart(alt.layer(*layers).properties(height=height), width="stretch")


def _frame(name: str, line: Line, is_log: bool) -> pd.DataFrame:
    y = np.where(line.y > 0, line.y, np.nan) if is_log else line.y
    chosen = downsample(np.where(np.isfinite(line.x), y, np.nan), MAX_POINTS)
    return pd.DataFrame({"x": line.x[chosen], "y": y[chosen], "name": name, "is_faint": line.is_faint})
