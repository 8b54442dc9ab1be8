"""Reads metrics.jsonl by bytes into columns: only what is new each time, never a half-written line. Knows no charts.

A work dir made by hand with `xtuner train` has no metrics.jsonl; XTuner's own scalars.json (means of ten steps) is read then.
"""

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.runs.columns import Column, GrowingRows
from core.runs.directory import RunDirectory

COLUMNS: Final = (
    "iteration", "epoch", "total_iterations", "loss", "lr", "grad_norm", "tokens", "step_seconds", "data_seconds",
    "memory_bytes", "at",
)  # fmt: skip
"""Columns of a metrics line; one that a line lacks, or has as null, is NaN."""
_BLOCK_BYTES: Final = 2 * 2**20
"""Small enough that the memory of one block is used again for the next."""
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
        self._offset = self._inode = 0
        self._rows = GrowingRows(len(COLUMNS))
        self._metrics = merge_resumes(self._rows.view())

    def refresh(self) -> Metrics:
        """All metrics so far. A file that is missing is empty; one that was replaced or cut is read anew."""
        with self._lock:
            before = len(self._rows)
            self._offset, self._inode = read_since(self._path, self._offset, self._inode, self._rows)
            if len(self._rows) != before:
                self._metrics = merge_resumes(self._rows.view())
            return self._metrics


def read_since(path: Path, offset: int, inode: int, into: GrowingRows) -> tuple[int, int]:
    """Append the rows of the whole lines after byte `offset` to `into`; new offset and inode.

    A last line without its newline stays for the next call. A file that has shrunk, or has another inode than `inode` (0: not
    known), is read from 0 after `into` was emptied.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115  (closed below; only opening may fail)
    except OSError:
        return offset, inode
    with stream:
        status = os.fstat(stream.fileno())
        if status.st_size < offset or inode not in (0, status.st_ino):
            offset = 0
            into.clear()
        stream.seek(offset)
        while block := stream.read(_BLOCK_BYTES):
            end = block.rfind(b"\n") + 1
            if not end:
                break
            whole = block if end == len(block) else block[:end]
            if len(into) == 0 and status.st_size > _BLOCK_BYTES:
                into.reserve(round(1.02 * status.st_size * whole.count(b"\n") / end))
            _append(whole, into)
            offset += end
            stream.seek(offset)
    return offset, status.st_ino


def parse(block: bytes) -> Column:
    """Rows of whole lines, array (rows, len(COLUMNS)). Lines that are no JSON object with an iteration are passed over."""
    rows = GrowingRows(len(COLUMNS))
    _append(block, rows)
    return rows.view()


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
    rows = GrowingRows(len(COLUMNS))
    for file in sorted(run.path.glob("*/vis_data/scalars.json")):
        read_since(file, 0, 0, rows)
    return merge_resumes(rows.view())


def _append(block: bytes, into: GrowingRows) -> None:
    if len(block) >= _FAST_FROM_BYTES and _append_uniform(block, into):
        return
    rows = [row for line in block.splitlines() if (row := _parse_line(line)) is not None]
    into.extend(len(rows))[:] = np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS))


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


def _append_uniform(block: bytes, into: GrowingRows) -> bool:
    """The fast way (ten times `json`, for files of a million lines): lines that all have the same keys in the same order.

    Without their names, quotes and braces such lines are CSV. False, and nothing is appended, if the block is not like that.
    """
    import pyarrow as pa
    from pyarrow import csv

    first = _keys(block[: block.find(b"\n")])
    last = _keys(block[block.rfind(b"\n", 0, -1) + 1 : -1])
    if first is None or first != last or "iteration" not in first or set(first) - set(COLUMNS):
        return False
    # NaN → NN, null → nothing, 1e-05 → 1E-05, Infinity → I, which is no number: such a block goes the careful way.
    bare = block.replace(b"e-", b"E-").translate(None, _NOT_NUMBERS)
    try:
        table = csv.read_csv(
            pa.BufferReader(bare),
            read_options=csv.ReadOptions(column_names=list(first)),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(first, pa.float64()), null_values=["", "NN"], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid:
        return False
    if table["iteration"].null_count or table.num_rows != block.count(b"\n"):
        return False  # a line with other keys, or an empty one
    rows = into.extend(table.num_rows)
    for number, name in enumerate(COLUMNS):
        rows[:, number] = table[name].to_numpy() if name in first else np.nan
    return True


def _keys(line: bytes) -> tuple[str, ...] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return tuple(value) if isinstance(value, dict) else None
