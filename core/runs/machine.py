"""Reads gpu.jsonl by bytes into columns: GPUs and machine over time, only what is new each time. Knows no charts."""

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.runs.columns import Column, GrowingRows

MACHINE_FIELDS: Final = (
    "cpu_percent", "run_cpu_percent", "ram_used_bytes", "ram_total_bytes", "run_ram_bytes", "disk_free_bytes",
    "disk_read_bytes_per_second", "disk_write_bytes_per_second", "net_receive_bytes_per_second", "net_send_bytes_per_second",
)  # fmt: skip
GPU_FIELDS: Final = (
    "utilization_percent", "memory_used_bytes", "memory_total_bytes", "power_watts", "temperature_celsius", "sm_clock_mhz",
    "throttle_reasons",
)  # fmt: skip
_BLOCK_BYTES: Final = 4 * 2**20
_FAST_FROM_BYTES: Final = 256 * 2**10


@dataclass(frozen=True, slots=True)
class MachineSeries:
    """Sensors over time. What did not answer is NaN."""

    at: Column
    """Unix seconds, of `machine`."""
    machine: Mapping[str, Column] = field(default_factory=dict)
    gpus: Mapping[str, Mapping[str, Column]] = field(default_factory=dict)
    """`GPU 0` → field → values, with its own `at`."""

    def __len__(self) -> int:
        return len(self.at)


class MachineReader:
    """Follows one gpu.jsonl. `refresh()` reads what was added since; several threads may call it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._offset = self._inode = 0
        self._machine = GrowingRows(1 + len(MACHINE_FIELDS))
        self._gpus = GrowingRows(2 + len(GPU_FIELDS))
        self._series = MachineSeries(np.empty(0))

    def refresh(self) -> MachineSeries:
        """All samples so far. A missing file is empty; one that was replaced (it is thinned when it grows long) is read anew."""
        with self._lock:
            if self._read():
                self._series = _series(self._machine.view(), self._gpus.view())
            return self._series

    def _read(self) -> bool:
        try:
            stream = open(self._path, "rb")  # noqa: SIM115  (closed below; only opening may fail)
        except OSError:
            return False
        with stream:
            status = os.fstat(stream.fileno())
            has_changed = False
            if status.st_size < self._offset or self._inode not in (0, status.st_ino):
                self._offset, has_changed = 0, True
                self._machine.clear()
                self._gpus.clear()
            self._inode = status.st_ino
            stream.seek(self._offset)
            while block := stream.read(_BLOCK_BYTES):
                end = block.rfind(b"\n") + 1
                if not end:
                    break
                self._append(block[:end])
                has_changed = True
                self._offset += end
                stream.seek(self._offset)
        return has_changed

    def _append(self, block: bytes) -> None:
        if len(block) < _FAST_FROM_BYTES or not _append_fast(block, self._machine, self._gpus):
            _append_lines(block, self._machine, self._gpus)


def energy_kwh(series: MachineSeries, gpu: str, longest_gap_seconds: float = 120.0) -> float:
    """Energy a GPU took while it was watched: power × time between samples (trapezoids). Gaps, as before a resume, count nothing."""
    columns = series.gpus.get(gpu, {})
    if not columns:
        return 0.0
    at, watts = columns["at"], columns["power_watts"]
    seconds = np.diff(at)
    joules = seconds * (watts[1:] + watts[:-1]) / 2
    counts = np.isfinite(joules) & (seconds > 0) & (seconds < longest_gap_seconds)
    return float(joules[counts].sum()) / 3.6e6


def _series(machine: Column, gpus: Column) -> MachineSeries:
    columns = {name: machine[:, number] for number, name in enumerate(MACHINE_FIELDS, 1)}
    by_gpu = {}
    indices = gpus[:, 1]
    for index in np.unique(indices):
        rows = np.flatnonzero(indices == index)
        by_gpu[f"GPU {int(index)}"] = {
            "at": gpus[:, 0][rows],
            **{name: gpus[:, number][rows] for number, name in enumerate(GPU_FIELDS, 2)},
        }
    return MachineSeries(machine[:, 0], columns, by_gpu)


def _append_lines(block: bytes, machine: GrowingRows, gpus: GrowingRows) -> None:
    for line in block.splitlines():
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if not isinstance(sample, dict) or not isinstance(sample.get("at"), int | float):
            continue
        at = float(sample["at"])
        machine.extend(1)[0] = [at, *_numbers(sample, MACHINE_FIELDS)]
        cards = sample.get("gpus")
        for gpu in cards if isinstance(cards, list) else []:
            gpus.extend(1)[0] = [at, *_numbers(gpu, ("index", *GPU_FIELDS))]


def _numbers(value: Mapping[str, Any], names: Iterable[str]) -> list[float]:
    found = (value.get(name) for name in names)
    return [float(each) if isinstance(each, int | float) else math.nan for each in found]


def _append_fast(block: bytes, machine: GrowingRows, gpus: GrowingRows) -> bool:
    """By Arrow, which knows numbers and lists of structs; False, and nothing is appended, if a line is not like that."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    card = pa.struct([(name, pa.float64()) for name in ("index", *GPU_FIELDS)])
    schema = pa.schema([("at", pa.float64()), ("gpus", pa.list_(card)), *((n, pa.float64()) for n in MACHINE_FIELDS)])
    try:
        table = arrow_json.read_json(
            pa.BufferReader(block),
            read_options=arrow_json.ReadOptions(block_size=len(block)),
            parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        ).combine_chunks()
    except pa.ArrowInvalid:
        return False
    if table["at"].null_count or table.num_rows != block.count(b"\n"):
        return False
    at = table["at"].to_numpy()
    rows = machine.extend(table.num_rows)
    rows[:, 0] = at
    for number, name in enumerate(MACHINE_FIELDS, 1):
        rows[:, number] = table[name].to_numpy()
    for chunk in table["gpus"].chunks:
        cards = chunk.flatten()
        rows = gpus.extend(len(cards))
        rows[:, 0] = np.repeat(at, chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
        for number, name in enumerate(("index", *GPU_FIELDS), 1):
            rows[:, number] = cards.field(name).to_numpy(zero_copy_only=False)
    return True
