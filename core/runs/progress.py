"""How far a training run is and how long it will take. Knows metrics and clocks, no files."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from core.runs.metrics import Metrics

_RECENT: Final = 100
_LOSS_STEPS: Final = 10
_PAUSE_FACTOR: Final = 5.0
"""Where steps say no time of their own, a gap between two is taken for a pause when it is this many times the median step."""
_LONGEST_PAUSE_SECONDS: Final = 3600.0
"""A longer gap is a clock that was set, or a machine that slept."""


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a run stands. Numbers that are not known yet are None."""

    iteration: int
    total_iterations: int | None
    loss: float | None
    """`recent_loss` of now."""
    tokens_per_second: float | None
    remaining_seconds: float | None

    @property
    def fraction(self) -> float | None:
        return None if not self.total_iterations else min(1.0, self.iteration / self.total_iterations)


def measure(metrics: Metrics, started_at: float | None = None) -> TrainProgress:
    """Progress of a run from its metrics.

    The rest takes (median of the recent steps + pauses so far per iteration) × iterations left. Only rows written since
    `started_at` (Unix seconds: the start of the process) count for it, so that a resume does not count the time it lay still.
    """
    if not len(metrics):
        return TrainProgress(0, None, None, None, None)
    iteration = int(metrics["iteration"][-1])
    total = metrics.last("total_iterations")
    step_seconds, pause_seconds = _pace(metrics, started_at)
    remaining = None
    if total is not None and step_seconds is not None:
        remaining = max(0.0, total - iteration) * (step_seconds + pause_seconds)
    return TrainProgress(
        iteration=iteration,
        total_iterations=None if total is None else int(total),
        loss=recent_loss(metrics),
        tokens_per_second=tokens_per_second(metrics),
        remaining_seconds=remaining,
    )


def recent_loss(metrics: Metrics, until: int | None = None) -> float | None:
    """What the app calls the loss of a run, or at iteration `until`: mean of the last ten finite values up to there.

    One micro-step alone says little: its batch may be an easy one.
    """
    losses = metrics["loss"] if until is None else metrics["loss"][metrics["iteration"] <= until]
    losses = losses[np.isfinite(losses)][-_LOSS_STEPS:]
    return float(losses.mean()) if len(losses) else None


def tokens_per_second(metrics: Metrics, recent: int | None = _RECENT) -> float | None:
    """Tokens of the last `recent` steps (None: of all) by the time those steps took; None where they were not counted."""
    rows = slice(-recent, None) if recent else slice(None)
    tokens, seconds = metrics["tokens"][rows], metrics["step_seconds"][rows]
    counted = np.isfinite(tokens) & np.isfinite(seconds) & (seconds > 0)
    return float(tokens[counted].sum() / seconds[counted].sum()) if counted.any() else None


def _pace(metrics: Metrics, started_at: float | None) -> tuple[float | None, float]:
    """Seconds of a step, and seconds of pauses (validation, sample answers, saving) per iteration.

    A pause is what lies between the ends of two steps beside the second step itself.
    """
    at = metrics["at"]
    first = int(np.searchsorted(at, started_at)) if started_at is not None and np.isfinite(at).all() else 0
    recent = metrics["step_seconds"][-_RECENT:]
    recent = recent[np.isfinite(recent)]
    gaps, steps = np.diff(at[first:]), metrics["step_seconds"][first:][1:]
    is_usable = np.isfinite(gaps) & (gaps >= 0) & (gaps < _LONGEST_PAUSE_SECONDS)
    gaps, steps = gaps[is_usable], steps[is_usable]
    if len(recent):
        step = float(np.median(recent))
    elif len(gaps):
        step = float(np.median(gaps[-_RECENT:]))
    else:
        return None, 0.0
    usual = np.where(gaps > _PAUSE_FACTOR * step, step, gaps)
    pauses = np.maximum(0.0, gaps - np.where(np.isfinite(steps), steps, usual))
    return step, float(pauses.sum() / len(gaps)) if len(gaps) else 0.0
