"""Makes long series fit for a chart: fewer points with every extreme kept, and smoothing. Knows numbers only."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.runs.columns import Column

MAX_POINTS: Final = 2000


def downsample(values: Column, max_points: int = MAX_POINTS) -> NDArray[np.intp]:
    """Indices, rising, of at most `max_points` of `values`: the lowest and highest of each of equal parts, first and last.

    NaN and infinite values are left out: a chart cannot show them, health reports them.
    """
    is_usable = np.isfinite(values)
    if is_usable.all():
        return _extremes(values, max_points)
    usable = np.flatnonzero(is_usable)
    indices: NDArray[np.intp] = usable[_extremes(values[usable], max_points)]
    return indices


def ratio(amounts: Column, seconds: Column, max_points: int = MAX_POINTS) -> tuple[NDArray[np.intp], Column]:
    """Amount a second over equal parts of the steps: index of the last step of each part, and the ratio of the sums there."""
    parts = min(max_points, len(amounts))
    if not parts:
        return np.empty(0, dtype=np.intp), np.empty(0)
    starts = np.linspace(0, len(amounts), parts + 1).astype(np.intp)
    counted = np.isfinite(amounts) & np.isfinite(seconds)
    amount = np.add.reduceat(np.where(counted, amounts, 0), starts[:-1])
    time = np.add.reduceat(np.where(counted, seconds, 0), starts[:-1])
    return starts[1:] - 1, np.divide(amount, time, out=np.full(parts, np.nan), where=time > 0)


def _extremes(values: Column, max_points: int) -> NDArray[np.intp]:
    """Indices of the lowest and highest of equal parts, of the first and the last. All values are finite."""
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    size = -(-count // max(1, (max_points - 2) // 2))
    whole = count // size * size
    starts = np.arange(0, whole, size)
    blocks = values[:whole].reshape(-1, size)
    picked = [starts + blocks.argmin(axis=1), starts + blocks.argmax(axis=1)]
    if whole < count:
        picked.append(np.array([whole + values[whole:].argmin(), whole + values[whole:].argmax()]))
    indices: NDArray[np.intp] = np.unique(np.concatenate([*picked, [0, count - 1]]))
    return indices


def smooth(values: Column, weight: float) -> Column:
    """Exponential moving average, debiased as in Adam (Kingma and Ba 2015, section 3): the first values are not pulled to 0.

    `weight` in [0, 1) is that of the past: 0 changes nothing. NaN and infinite values neither count nor spread.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"weight must be in [0, 1), got {weight}")
    if weight == 0 or len(values) == 0:
        return values
    import pandas as pd

    usable = np.where(np.isfinite(values), values, np.nan)
    average = pd.Series(usable).ewm(alpha=1 - weight, adjust=True, ignore_na=True).mean()
    return np.where(np.isfinite(values), average.to_numpy(dtype=np.float64), np.nan)
