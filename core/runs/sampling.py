"""Samples the machine while a run lives: GPUs through NVML, CPU, memory, disk and network through /proc. Stdlib (+ pynvml).

Writes gpu.jsonl. A sensor that is missing is `None`; nothing here can fail the run.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from core.runs import processes
from core.runs.gpu_sensors import GpuSensors

SAMPLE_SECONDS: Final = 2.0
MAX_FILE_BYTES: Final = 24 * 2**20
"""When gpu.jsonl reaches this, every second line is dropped and samples are taken half as often: it never grows beyond."""
_SECTOR_BYTES: Final = 512
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_VIRTUAL_DISKS: Final = ("loop", "ram", "zram", "dm-", "md", "sr")


class MachineSensors:
    """CPU, memory, disk and network of the machine, and of the processes below one process. Rates need two readings."""

    def __init__(self, ancestor: int, folder: Path) -> None:
        self._ancestor, self._folder = ancestor, folder
        self._before: dict[str, float] = {}
        self._read_at = time.monotonic()
        self._count()

    def read(self) -> dict[str, Any]:
        before, read_at = self._before, self._read_at
        self._count()
        seconds = max(self._read_at - read_at, 1e-3)
        change = {name: value - before.get(name, value) for name, value in self._before.items()}
        memory = _meminfo()
        total, free = memory.get("MemTotal"), memory.get("MemAvailable")
        return {
            "cpu_percent": _percent(change.get("cpu_busy"), change.get("cpu_all")),
            "run_cpu_percent": round(100 * max(change["run_ticks"], 0) / _TICKS_PER_SECOND / seconds, 1),
            "ram_used_bytes": None if total is None or free is None else total - free,
            "ram_total_bytes": total,
            "run_ram_bytes": self._resident_bytes,
            "disk_free_bytes": self._free_bytes(),
            "disk_read_bytes_per_second": _rate(change.get("disk_read"), seconds),
            "disk_write_bytes_per_second": _rate(change.get("disk_write"), seconds),
            "net_receive_bytes_per_second": _rate(change.get("net_receive"), seconds),
            "net_send_bytes_per_second": _rate(change.get("net_send"), seconds),
            "oom_kills": processes.oom_kills(),
        }

    def _count(self) -> None:
        below = processes.descendants(self._ancestor)
        self._resident_bytes = sum(stat.resident_pages for stat in below) * _PAGE_BYTES
        self._read_at = time.monotonic()
        self._before = {"run_ticks": sum(stat.cpu_ticks for stat in below), **_cpu_ticks(), **_disk(), **_network()}

    def _free_bytes(self) -> int | None:
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return None
        return disk.f_bavail * disk.f_frsize


class Sampler:
    """Appends one line every two seconds, from a thread of its own: a driver that hangs holds up nobody."""

    def __init__(
        self,
        file: Path,
        folder: Path,
        max_bytes: int = MAX_FILE_BYTES,
        every: float = SAMPLE_SECONDS,
        gpus: Sequence[str] = (),
    ) -> None:
        self._file, self._folder, self._gpus = file, folder, gpus
        self.energy_joules = 0.0
        """What the run's own GPUs (UUIDs or indices) have taken since the start."""
        self.peak_gpu_bytes = 0
        """Most memory that was in use on one of them."""
        self._max_bytes, self.every_seconds = max_bytes, every
        self.latest: deque[dict[str, Any]] = deque(maxlen=64)
        """Samples that the watch has not seen yet."""
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        gpus, machine = GpuSensors(), MachineSensors(os.getpid(), self._folder)
        gpus.watch_xids()
        read_at = time.monotonic()
        due = read_at + self.every_seconds
        while not self._is_stopped.wait(max(due - time.monotonic(), 0)):
            due = max(due + self.every_seconds, time.monotonic())
            readings = gpus.read()
            self._count(readings, time.monotonic() - read_at)
            read_at = time.monotonic()
            sample = {"at": round(time.time(), 2), "gpus": readings, **machine.read()}
            self.latest.append(sample)
            self.append(sample)

    def _count(self, readings: list[dict[str, Any]], seconds: float) -> None:
        for gpu in readings:
            if gpu["uuid"] in self._gpus or str(gpu["index"]) in self._gpus:
                self.energy_joules += (gpu["power_watts"] or 0.0) * seconds
                self.peak_gpu_bytes = max(self.peak_gpu_bytes, gpu["memory_used_bytes"] or 0)

    def append(self, sample: dict[str, Any]) -> None:
        """Add one line. Without space, or without the folder, the sample is lost and nothing else."""
        line = json.dumps(sample, separators=(",", ":")).encode() + b"\n"
        try:
            with open(self._file, "ab") as stream:
                stream.write(line)
                size = stream.tell()
            if size > self._max_bytes:
                self._thin()
        except OSError:
            return

    def _thin(self) -> None:
        lines = self._file.read_bytes().splitlines(keepends=True)
        temporary = self._file.with_name(f".{self._file.name}.new")
        temporary.write_bytes(b"".join(lines[::2]))
        temporary.replace(self._file)
        self.every_seconds *= 2


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else round(100 * part / whole, 1)


def _rate(change: float | None, seconds: float) -> float | None:
    return None if change is None else round(max(change, 0) / seconds)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _cpu_ticks() -> dict[str, float]:
    first = next(iter(_lines("/proc/stat")), "")
    fields = [int(field) for field in first.split()[1:9]]
    if len(fields) < 5:
        return {}
    return {"cpu_all": sum(fields), "cpu_busy": sum(fields) - fields[3] - fields[4]}  # idle, iowait


def _meminfo() -> dict[str, int]:
    pairs = (line.split(":", 1) for line in _lines("/proc/meminfo") if ":" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if name in ("MemTotal", "MemAvailable")}


def _disk() -> dict[str, float]:
    """Bytes moved by whole physical disks since boot: /proc/diskstats lists partitions too, sysfs tells them apart."""
    rows = [line.split() for line in _lines("/proc/diskstats")]
    disks = [
        row
        for row in rows
        if len(row) > 9 and not row[2].startswith(_VIRTUAL_DISKS) and Path("/sys/block", row[2]).exists()
    ]
    if not disks:
        return {}
    return {
        "disk_read": sum(int(row[5]) for row in disks) * _SECTOR_BYTES,
        "disk_write": sum(int(row[9]) for row in disks) * _SECTOR_BYTES,
    }


def _network() -> dict[str, float]:
    rows = [line.replace(":", " ").split() for line in _lines("/proc/net/dev")[2:]]
    outside = [row for row in rows if len(row) > 9 and row[0] != "lo"]
    if not outside:
        return {}
    return {"net_receive": sum(int(row[1]) for row in outside), "net_send": sum(int(row[9]) for row in outside)}
