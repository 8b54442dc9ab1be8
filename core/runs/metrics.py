"""Reads metrics.jsonl by bytes into columns: only what is new each time, never a half-written line. Knows no charts.

A work dir made by hand with `xtuner train` has no metrics.jsonl; XTuner's own scalars.json (means of ten steps) is read then.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.runs.directory import RunDirectory

Column = NDArray[np.float64]
COLUMNS: Final = (
    "iteration", "epoch", "total_iterations", "loss", "lr", "grad_norm", "tokens", "step_seconds", "data_seconds",
    "memory_bytes", "at",
)  # fmt: skip
"""Columns of a metrics line; one that a line lacks, or has as null, is NaN."""
_BLOCK_BYTES: Final = 16 * 2**20
_FAST_FROM_BYTES: Final = 64 * 2**10
_XTUNER_NAMES: Final = {"iteration": ("step", "iter"), "step_seconds": ("time",), "data_seconds": ("data_time",)}
_NOT_NUMBERS: Final = bytes(range(ord("a"), ord("z") + 1)) + b'{}" :_'


@dataclass(frozen=True, slots=True)
class Metrics:
    """Columns of equal length, one row an iteration, iterations strictly rising. Arrays are read-only views."""

    columns: Mapping[str, Column]
    resumed_at: tuple[int, ...] = ()
    """Iterations at which the run went on after it had been stopped or had crashed."""

    def __len__(self) -> int:
        return len(self.columns["iteration"])

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def last(self, name: str) -> float | None:
        """The latest finite value of a column."""
        column = self.columns[name]
        for value in reversed(column[-1000:]):
            if math.isfinite(value):
                return float(value)
        return None

    def has(self, name: str) -> bool:
        """Whether a column holds any finite value."""
        return bool(np.isfinite(self.columns[name]).any())


class MetricsReader:
    """Follows one file. `refresh()` reads what was added since; several threads may call it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._offset = self._inode = self._count = 0
        self._buffer: Column = np.empty((1024, len(COLUMNS)), order="F")
        self._metrics = merge_resumes(self._buffer[:0])

    def refresh(self) -> Metrics:
        """All metrics so far. A file that is missing is empty; one that was replaced or cut is read anew."""
        with self._lock:
            rows, self._offset, self._inode = read_since(self._path, self._offset, self._inode, on_restart=self._forget)
            if len(rows):
                self._append(rows)
                self._metrics = merge_resumes(self._buffer[: self._count])
            return self._metrics

    def _forget(self) -> None:
        self._count = 0
        self._metrics = merge_resumes(self._buffer[:0])

    def _append(self, rows: Column) -> None:
        needed = self._count + len(rows)
        if needed > len(self._buffer):
            grown = np.empty((max(needed, 2 * len(self._buffer)), len(COLUMNS)), order="F")
            grown[: self._count] = self._buffer[: self._count]
            self._buffer = grown
        self._buffer[self._count : needed] = rows
        self._count = needed


def read_since(
    path: Path, offset: int, inode: int = 0, *, on_restart: Callable[[], None] | None = None
) -> tuple[Column, int, int]:
    """Rows of the whole lines after byte `offset`: array (rows, len(COLUMNS)), new offset, inode.

    A last line without its newline stays for the next call. A file that has shrunk, or has another inode, is read from 0 after
    a call of `on_restart`.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115  (closed below; only opening may fail)
    except OSError:
        return _no_rows(), offset, inode
    with stream:
        status = os.fstat(stream.fileno())
        if status.st_size < offset or inode not in (0, status.st_ino):
            offset = 0
            if on_restart is not None:
                on_restart()
        stream.seek(offset)
        parts: list[Column] = []
        while block := stream.read(_BLOCK_BYTES):
            end = block.rfind(b"\n") + 1
            if not end:
                break
            parts.append(parse(block[:end]))
            offset += end
            stream.seek(offset)
    return (np.concatenate(parts) if parts else _no_rows()), offset, status.st_ino


def parse(block: bytes) -> Column:
    """Rows of whole lines, array (rows, len(COLUMNS)). Lines that are no JSON object with an iteration are passed over."""
    if len(block) >= _FAST_FROM_BYTES and (fast := _parse_uniform(block)) is not None:
        return fast
    rows = [row for line in block.splitlines() if (row := _parse_line(line)) is not None]
    return np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS))


def merge_resumes(rows: Column) -> Metrics:
    """Where a resumed run repeats iterations, the newest wins: a row stays if every later row has a higher iteration."""
    iterations = rows[:, 0]
    resumed: tuple[int, ...] = ()
    if len(iterations) > 1:
        resumed = tuple(int(n) for n in iterations[1:][iterations[1:] <= iterations[:-1]])
        if resumed:
            lowest_after = np.minimum.accumulate(iterations[::-1])[::-1]
            keep = np.append(iterations[:-1] < lowest_after[1:], True)
            rows = rows[keep]
    return Metrics({name: rows[:, number] for number, name in enumerate(COLUMNS)}, resumed)


def read_work_dir(run: RunDirectory) -> Metrics:
    """Metrics of a work dir made by hand: all its `<timestamp>/vis_data/scalars.json`, oldest first."""
    parts = [read_since(file, 0)[0] for file in sorted(run.path.glob("*/vis_data/scalars.json"))]
    return merge_resumes(np.concatenate(parts) if parts else _no_rows())


def _no_rows() -> Column:
    return np.empty((0, len(COLUMNS)))


def _parse_line(line: bytes) -> list[float] | None:
    try:
        value = json.loads(line)  # takes NaN and Infinity too
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    row = [_number(value, name) for name in COLUMNS]
    if math.isnan(row[0]):
        return None
    if math.isnan(row[COLUMNS.index("memory_bytes")]) and isinstance(value.get("memory"), int | float):
        row[COLUMNS.index("memory_bytes")] = value["memory"] * 2**20
    if math.isnan(row[COLUMNS.index("tokens")]) and isinstance(value.get("tokens_per_sec"), int | float):
        row[COLUMNS.index("tokens")] = value["tokens_per_sec"] * row[COLUMNS.index("step_seconds")]
    return row


def _number(value: Mapping[str, Any], name: str) -> float:
    for key in (name, *_XTUNER_NAMES.get(name, ())):
        found = value.get(key)
        if isinstance(found, int | float):
            return float(found)
    return math.nan


def _parse_uniform(block: bytes) -> Column | None:
    """The fast way (5 times `json`, for files of a million lines): lines that all have the same keys in the same order.

    Without their names, quotes and braces such lines are CSV. None if the block is not like that.
    """
    import pyarrow as pa
    from pyarrow import csv

    first = _keys(block[: block.find(b"\n")])
    last = _keys(block[block.rfind(b"\n", 0, -1) + 1 : -1])
    if first is None or first != last or "iteration" not in first or set(first) - set(COLUMNS):
        return None
    if b"Infinity" in block or block.count(b'"iteration"') != block.count(b"\n"):
        return None
    bare = block.replace(b"e-", b"E-").translate(None, _NOT_NUMBERS)  # NaN → NN, null → nothing, 1e-05 → 1E-05
    try:
        table = csv.read_csv(
            pa.BufferReader(bare),
            read_options=csv.ReadOptions(column_names=list(first)),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(first, pa.float64()), null_values=["", "NN"], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid:
        return None
    rows = np.full((table.num_rows, len(COLUMNS)), np.nan, order="F")  # columns are read, not rows
    for name in first:
        rows[:, COLUMNS.index(name)] = table[name].to_numpy()
    return None if np.isnan(rows[:, 0]).any() else rows


def _keys(line: bytes) -> tuple[str, ...] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return tuple(value) if isinstance(value, dict) else None
