"""What can be wrong with the loss of a training run. One class a symptom, fed with one metrics line at a time. Stdlib only."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from core.runs.findings import Finding, number

_NORMAL: Final = 1.4826
"""Median absolute deviation × this = standard deviation, for normal noise."""


class LossNotANumber:
    """The loss is NaN or infinite: once may be a batch without a trained token, three times in a row is a broken model."""

    kind: ClassVar[str] = "nan"
    _error_from = 3
    _calm_steps = 10

    def __init__(self) -> None:
        self._in_a_row = self._since_good = 0
        self._first: int | None = None
        self._finding: Finding | None = None

    def see(self, row: Mapping[str, Any]) -> Finding | None:
        loss = row.get("loss")
        if isinstance(loss, int | float) and not math.isfinite(loss):
            self._in_a_row, self._since_good = self._in_a_row + 1, 0
            if self._in_a_row == 1:
                self._first = int(number(row, "iteration") or 0)
            level = "error" if self._in_a_row >= self._error_from else "warning"
            self._finding = Finding(level, {"count": self._in_a_row, "first": self._first})
        else:
            self._in_a_row, self._since_good = 0, self._since_good + 1
            if self._since_good >= self._calm_steps:
                self._finding = None
        return self._finding


class LossSpike:
    """The mean of the last five losses stands out of the hundred before by 5 robust standard deviations and by a fifth."""

    kind: ClassVar[str] = "spike"
    _sigmas, _ratio, _warm = 5.0, 1.2, 50

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=5)
        self._before: deque[float] = deque(maxlen=100)

    def see(self, row: Mapping[str, Any]) -> Finding | None:
        loss = number(row, "loss")
        if loss is None:
            return None
        if len(self._recent) == self._recent.maxlen:
            self._before.append(self._recent[0])
        self._recent.append(loss)
        if len(self._before) < self._warm:
            return None
        level = math.fsum(self._recent) / len(self._recent)
        if level < self._ratio * math.fsum(self._before) / len(self._before):
            return None
        usual = statistics.median(self._before)
        spread = _NORMAL * statistics.median(abs(value - usual) for value in self._before)
        if level < max(usual + self._sigmas * spread, self._ratio * usual):
            return None
        return Finding("warning", {"loss": round(level, 4), "usual": round(usual, 4)})


class Divergence:
    """The smoothed loss has been half as high again as its best for 50 steps."""

    kind: ClassVar[str] = "divergence"
    _weight, _ratio, _margin, _warm, _patience = 0.98, 1.5, 0.1, 100, 50

    def __init__(self) -> None:
        self._sum = 0.0
        self._steps = self._above = 0
        self._best = math.inf
        self._best_at: int | None = None

    def see(self, row: Mapping[str, Any]) -> Finding | None:
        loss = number(row, "loss")
        if loss is None:
            return None
        if self._steps:
            # One wild value must not move the average for a hundred steps.
            loss = min(loss, 3 * self._sum / (1 - self._weight**self._steps) + 1)
        self._steps += 1
        self._sum = self._weight * self._sum + (1 - self._weight) * loss
        smoothed = self._sum / (1 - self._weight**self._steps)
        if self._steps < self._warm:
            return None
        if smoothed < self._best:
            self._best, self._best_at = smoothed, int(number(row, "iteration") or 0)
        self._above = self._above + 1 if smoothed > self._ratio * self._best + self._margin else 0
        if self._above < self._patience:
            return None
        return Finding("error", {"loss": round(smoothed, 4), "best": round(self._best, 4), "best_at": self._best_at})


class Plateau:
    """A fifth of the run has brought less than half a percent over the fifth before it, and the noise is too low to hide more."""

    kind: ClassVar[str] = "plateau"
    _blocks, _gain, _noise, _late = 10, 0.005, 0.005, 0.9

    def __init__(self) -> None:
        self._block: list[float] = []
        self._means: deque[float] = deque(maxlen=2 * self._blocks)
        self._finding: Finding | None = None

    def see(self, row: Mapping[str, Any]) -> Finding | None:
        loss = number(row, "loss")
        total = number(row, "total_iterations")
        if loss is None:
            return self._finding
        self._block.append(loss)
        length = max(20, round(total / 50)) if total else 50
        if len(self._block) >= length:
            self._means.append(math.fsum(self._block) / len(self._block))
            self._block.clear()
            is_late = bool(total and (number(row, "iteration") or 0) > self._late * total)
            self._finding = None if is_late else self._compare(length)
        return self._finding

    def _compare(self, length: int) -> Finding | None:
        if len(self._means) < 2 * self._blocks:
            return None
        means = list(self._means)
        before, now = means[: self._blocks], means[self._blocks :]
        old, new = statistics.fmean(before), statistics.fmean(now)
        noise = statistics.stdev(now) / math.sqrt(self._blocks)
        if old <= 0 or not -10 * self._gain < (old - new) / old < self._gain or noise > self._noise * old:
            return None
        return Finding("info", {"loss": round(new, 4), "steps": self._blocks * length})
