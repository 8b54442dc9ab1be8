"""What can be wrong with the steps of a training run, beside the loss. One class a symptom, fed a metrics line at a time. Stdlib only."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from core.runs.findings import Finding, StepDetector, number
from core.runs.health_loss import Divergence, LossNotANumber, LossSpike, Plateau


class GradientNotANumber:
    """The gradient norm is NaN or infinite three optimizer steps in a row; a loss scaler skips one or two in good health."""

    kind: ClassVar[str] = "grad_nan"
    _error_from = 3

    def __init__(self) -> None:
        self._in_a_row = 0

    def see(self, row: Mapping[str, Any]) -> Finding | None:
        norm = row.get("grad_norm")
        if isinstance(norm, int | float):
            self._in_a_row = 0 if math.isfinite(norm) else self._in_a_row + 1
        return Finding("error", {"count": self._in_a_row}) if self._in_a_row >= self._error_from else None


class ExplodingGradients:
    """Three of the last five gradient norms, before clipping, were ten times the median of the hundred before."""

    kind: ClassVar[str] = "grad_explosion"
    _ratio, _warm, _needed = 10.0, 30, 3

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=5)
        self._before: deque[float] = deque(maxlen=100)
        self._finding: Finding | None = None

    def see(self, row: Mapping[str, Any]) -> Finding | None:
        norm = number(row, "grad_norm")
        if norm is None:
            return self._finding
        if len(self._recent) == self._recent.maxlen:
            self._before.append(self._recent[0])
        self._recent.append(norm)
        self._finding = None
        if len(self._before) >= self._warm and max(self._recent) > self._ratio * min(self._before):
            usual = statistics.median(self._before)
            high = sum(value > self._ratio * usual for value in self._recent)
            if usual > 0 and high >= self._needed:
                self._finding = Finding("warning", {"norm": round(max(self._recent), 3), "usual": round(usual, 3)})
        return self._finding


class SlowData:
    """More than half of the last fifty steps' time was waiting for data."""

    kind: ClassVar[str] = "slow_data"
    _on, _off = 0.5, 0.3

    def __init__(self) -> None:
        self._rows: deque[tuple[float, float]] = deque(maxlen=50)
        self._is_on = False

    def see(self, row: Mapping[str, Any]) -> Finding | None:
        step, data = number(row, "step_seconds"), number(row, "data_seconds")
        if step is None or data is None:
            return None
        self._rows.append((step, data))
        total = math.fsum(each[0] for each in self._rows)
        if len(self._rows) < 50 or total <= 0:
            return None
        share = math.fsum(each[1] for each in self._rows) / total
        self._is_on = share > (self._off if self._is_on else self._on)
        return Finding("warning", {"percent": round(100 * share)}) if self._is_on else None


class Stall:
    """No step for 20 times the median time, for longer than any pause before (saving, sample answers), and for two minutes."""

    _factor, _floor_seconds, _first_seconds = 20.0, 120.0, 1800.0
    _longest_pause_seconds = 3600.0

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=50)
        self._pause = 0.0
        self._last: float | None = None
        self._began: float | None = None

    def saw(self, row: Mapping[str, Any], clock: float) -> None:
        step = number(row, "step_seconds")
        if step is not None:
            self._steps.append(step)
        if self._last is not None:
            self._pause = max(self._pause, min(clock - self._last, self._longest_pause_seconds))
        self._last = clock

    def wait(self, clock: float) -> None:
        """No step can be expected before this moment."""
        self._last = clock if self._last is not None else None

    def look(self, clock: float) -> Finding | None:
        """Monotonic seconds: a clock that is set back or forward stalls nothing."""
        if self._last is None:
            return None
        quiet, usual = clock - self._last, statistics.median(self._steps) if self._steps else 1.0
        if quiet < max(self._factor * usual, self._floor_seconds, 2 * self._pause):
            return None
        return Finding("error", {"seconds": round(quiet), "usual": round(usual, 2)})

    def look_at_start(self, clock: float) -> Finding | None:
        """Half an hour without a first step."""
        self._began = clock if self._began is None else self._began
        quiet = clock - self._began
        if self._last is not None or quiet <= self._first_seconds:
            return None
        return Finding("warning", {"minutes": round(quiet / 60)})


STEP_DETECTORS: Final[tuple[type[StepDetector], ...]] = (
    LossNotANumber,
    GradientNotANumber,
    LossSpike,
    Divergence,
    Plateau,
    ExplodingGradients,
    SlowData,
)
