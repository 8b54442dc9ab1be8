"""The curves of a run: loss raw, smoothed and of validation; learning rate, gradient norm, speed, step time, GPU use."""

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from core.runs.curves import ratio, smooth
from core.runs.directory import RunDirectory
from core.runs.metrics import Metrics
from core.runs.samples import SampleAnswer, read_answers
from core.runs.utilisation import flops_per_token, mfu
from core.runs.validation import Best, best_of, read_validation
from pages.ui.charts import SMALL_POINTS, Line, line_chart
from pages.ui.run_axes import Axis, ChartSettings, axis_of
from pages.ui.run_data import gpu_names, model_shape, spec_of
from pages.ui.run_marks import marks_legend, run_marks
from pages.ui.text import t

_SPEED_STEPS = 10
"""Tokens/s is that of at least this many steps together."""


def run_curves(run: RunDirectory, metrics: Metrics, settings: ChartSettings, started_at: float | None) -> None:
    """All curves over iterations or minutes, and the sample answers beside the loss."""
    if not len(metrics):
        st.caption(t("monitor.no_metrics") if started_at is None else t("monitor.starting"))
        return
    axis = axis_of(metrics, settings, started_at, run_marks(run, metrics))
    answers = read_answers(run)
    place, beside = st.columns([3, 1]) if answers else (st.container(), None)
    with place:
        _loss(run, metrics, axis, settings)
    if beside is not None:
        with beside:
            _latest_answers(answers)
    _small_charts(run, metrics, axis)


def _loss(run: RunDirectory, metrics: Metrics, axis: Axis, settings: ChartSettings) -> None:
    loss = metrics["loss"]
    lines = {t("monitor.smoothed", weight=f"{settings.smoothing:.2f}"): axis.line(smooth(loss, settings.smoothing))}
    if settings.smoothing:
        lines[t("monitor.raw")] = axis.line(loss, is_faint=True)
    validation = np.array(read_validation(run), dtype=np.float64).reshape(-1, 2)
    if len(validation):
        x = np.interp(validation[:, 0], metrics["iteration"], axis.x)
        shown = x >= axis.x[axis.first]
        lines[t("monitor.validation")] = Line(x[shown], validation[shown, 1])
    line_chart(
        t("monitor.loss"),
        lines,
        x_title=axis.title,
        is_log=settings.is_log,
        marks=axis.shown_marks,
        height=300,
        key="monitor_loss",
    )
    if axis.shown_marks:
        st.caption(marks_legend(axis.shown_marks))
    if best := best_of(run):
        st.caption(_best_note(best, validation))


def _best_note(best: Best, validation: NDArray[np.float64]) -> str:
    """The lowest validation loss against the newest one: rising again, it says that the rows are being learned by heart."""
    key = "monitor.best_at" if best.iteration else "monitor.best_at_start"
    return t(key, loss=f"{best.loss:.4f}", iteration=f"{best.iteration:,}", latest=f"{validation[-1, 1]:.4f}")


def _latest_answers(answers: list[SampleAnswer]) -> None:
    """The first prompt's answers, newest first: what the curve means in words."""
    prompt = answers[0].prompt
    st.markdown(f"**{t('monitor.tab_samples')}**")
    with st.container(height=300):
        st.caption(prompt)
        for answer in reversed([answer for answer in answers if answer.prompt == prompt]):
            st.caption(f":material/flag: {t('monitor.sample_at', iteration=f'{answer.iteration:,}')}")
            st.text(answer.answer[:400])


def _small_charts(run: RunDirectory, metrics: Metrics, axis: Axis) -> None:
    charts: list[tuple[str, dict[str, Line]]] = [
        (t(f"monitor.{name}"), {t(f"monitor.{name}"): axis.line(metrics[name])})
        for name in ("lr", "grad_norm")
        if metrics.has(name)
    ]
    speed = _speed(metrics, axis)
    if speed is not None:
        charts.append((t("monitor.speed"), {t("monitor.speed"): speed}))
    if metrics.has("step_seconds"):
        charts.append((t("monitor.step_seconds"), _step_time(metrics, axis)))
    if metrics.has("memory_bytes"):
        line = axis.line(metrics["memory_bytes"] / 2**30)
        charts.append((t("monitor.peak_memory"), {t("monitor.peak_memory"): line}))
    factor = _mfu_factor(run, metrics)
    if factor is not None and speed is not None:
        charts.append((t("monitor.mfu"), {t("monitor.mfu"): Line(speed.x, 100 * factor * speed.y)}))
    columns = st.columns(3)
    for number, (title, lines) in enumerate(charts):
        with columns[number % 3]:
            line_chart(
                title, lines, x_title=axis.title, height=190, max_points=SMALL_POINTS, key=f"monitor_small_{number}"
            )
    if factor is not None:
        st.caption(t("monitor.mfu_formula"))


def _step_time(metrics: Metrics, axis: Axis) -> dict[str, Line]:
    lines = {t("monitor.step_part"): axis.line(metrics["step_seconds"])}
    if metrics.has("data_seconds"):
        lines[t("monitor.data_part")] = axis.line(metrics["data_seconds"])
    return lines


def _speed(metrics: Metrics, axis: Axis) -> Line | None:
    """Tokens a second over parts of at least some steps; None where tokens were not counted."""
    if not (metrics.has("tokens") and metrics.has("step_seconds")):
        return None
    tokens, seconds = metrics["tokens"][axis.first :], metrics["step_seconds"][axis.first :]
    parts = max(1, min(SMALL_POINTS, len(tokens) // _SPEED_STEPS))
    places, speed = ratio(tokens, seconds, parts)
    return Line(axis.x[axis.first :][places], speed)


def _mfu_factor(run: RunDirectory, metrics: Metrics) -> float | None:
    """MFU for one token a second; None without GPUs that are known, or without the model's shape."""
    spec = spec_of(run)
    names = [gpu_names().get(gpu, "") for gpu in spec.gpus] if spec else []
    if spec is None or not names:
        return None
    details = spec.details
    shape = model_shape(str((details.get("base_model") or {}).get("path") or ""))
    if shape is None:
        return None
    sequences = float(details.get("batch_size") or 1) * len(names)
    tokens = float(np.nanmean(metrics["tokens"])) / sequences
    return mfu(1.0, flops_per_token(shape, round(tokens), is_full=details.get("method") == "full"), names)
