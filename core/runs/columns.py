"""Rows of numbers that grow: one array, column by column in memory, with room to spare. Knows no files."""

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]


class GrowingRows:
    """(rows, width) of floats. `view()` shares memory and stays valid: what is appended later lies behind it."""

    def __init__(self, width: int) -> None:
        self._buffer: Column = np.empty((1024, width), order="F")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def view(self) -> Column:
        """All rows; read-only."""
        rows = self._buffer[: self._count]
        rows.flags.writeable = False
        return rows

    def clear(self) -> None:
        """Forget all rows. Views handed out before keep theirs."""
        self._buffer = np.empty((1024, self._buffer.shape[1]), order="F")
        self._count = 0

    def reserve(self, rows: int) -> None:
        """Room for `rows` more without another copy."""
        needed = self._count + rows
        if needed > len(self._buffer):
            grown = np.empty((needed + needed // 4, self._buffer.shape[1]), order="F")
            grown[: self._count] = self._buffer[: self._count]
            self._buffer = grown

    def extend(self, rows: int) -> Column:
        """Room for `rows` rows behind the others, to be filled by the caller; they count from now on."""
        self.reserve(rows)
        added = self._buffer[self._count : self._count + rows]
        self._count += rows
        return added
