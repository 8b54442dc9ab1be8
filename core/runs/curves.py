"""Makes long series fit for a chart: fewer points with every extreme kept, and smoothing. Knows numbers only."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.runs.metrics import Column

MAX_POINTS: Final = 2000


def downsample(values: Column, max_points: int = MAX_POINTS) -> NDArray[np.intp]:
    """Indices, rising, of at most `max_points` of `values`: the lowest and highest of each of equal parts, first and last.

    NaN and infinite values are left out: a chart cannot show them, health reports them.
    """
    usable = np.flatnonzero(np.isfinite(values))
    if len(usable) <= max_points:
        return usable
    parts = max(1, (max_points - 2) // 2)
    edges = np.linspace(0, len(usable), parts + 1).astype(np.intp)[:-1]
    chosen = values[usable]
    part_of = np.repeat(np.arange(parts), np.diff(np.append(edges, len(usable))))
    order = np.lexsort((chosen, part_of))  # within each part from lowest to highest
    lowest = order[edges]
    highest = order[np.append(edges[1:], len(usable)) - 1]
    picked = np.unique(np.concatenate([lowest, highest, [0, len(usable) - 1]]))
    indices: NDArray[np.intp] = usable[picked]
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
