"""Processes of this machine as /proc shows them: who they are, who descends from whom. Stdlib only; knows no run."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

RUN_VARIABLE: Final = "DANLU_RUN"
"""Environment variable that marks every process of a run with the path of its directory."""
_PROC: Final = Path("/proc")
_PR_SET_CHILD_SUBREAPER: Final = 36
_BOOT_ID: Final = _PROC / "sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The fields of `/proc/<pid>/stat` that matter here."""

    pid: int
    parent: int
    session: int
    is_zombie: bool
    cpu_ticks: int
    started_ticks: int
    """Clock ticks after boot."""
    resident_pages: int


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be mistaken for a later one with the same pid, nor for one of another boot."""

    pid: int
    started_ticks: int
    boot_id: str

    def is_alive(self) -> bool:
        """Whether this very process still runs. A zombie does not."""
        stat = read_stat(self.pid)
        return (
            stat is not None
            and not stat.is_zombie
            and stat.started_ticks == self.started_ticks
            and self.boot_id == boot_id()
        )

    def to_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "started_ticks": self.started_ticks, "boot_id": self.boot_id}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(int(value["pid"]), int(value["started_ticks"]), str(value["boot_id"]))


def boot_id() -> str:
    """Identifier of this boot of the machine; empty where the kernel gives none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of the process that has `pid` now."""
    stat = read_stat(pid)
    return None if stat is None else ProcessIdentity(pid, stat.started_ticks, boot_id())


def read_stat(pid: int) -> ProcessStat | None:
    """`/proc/<pid>/stat`, or None if there is no such process. Fields as in proc(5)."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may itself hold spaces and parentheses: count from the last one.
    rest = text[text.rindex(")") + 2 :].split()
    return ProcessStat(
        pid=pid,
        parent=int(rest[1]),
        session=int(rest[3]),
        is_zombie=rest[0] in ("Z", "X"),
        cpu_ticks=int(rest[11]) + int(rest[12]),
        started_ticks=int(rest[19]),
        resident_pages=int(rest[21]),
    )


def all_processes() -> Iterator[ProcessStat]:
    """Every process that can be seen, zombies too."""
    for name in os.listdir(_PROC):  # noqa: PTH208  (a Path for each would cost more than the rest)
        if name.isdecimal() and (stat := read_stat(int(name))) is not None:
            yield stat


def descendants(ancestor: int, leave_out: Callable[[ProcessStat], bool] = lambda _: False) -> list[ProcessStat]:
    """Living children of `ancestor`, their children, and so on; without `ancestor`, and without what is below one left out."""
    children: dict[int, list[ProcessStat]] = {}
    for stat in all_processes():
        children.setdefault(stat.parent, []).append(stat)
    found: list[ProcessStat] = []
    waiting = [ancestor]
    while waiting:
        below = [stat for stat in children.get(waiting.pop(), []) if not leave_out(stat)]
        found.extend(stat for stat in below if not stat.is_zombie)
        waiting.extend(stat.pid for stat in below)
    return found


def marked(run_path: str) -> list[ProcessStat]:
    """Living processes whose environment carries the mark of the run at `run_path`, whoever their parent is."""
    mark = f"{RUN_VARIABLE}={run_path}".encode()
    return [stat for stat in all_processes() if not stat.is_zombie and mark in _environment(stat.pid)]


def command_line(pid: int) -> list[str]:
    """The arguments `pid` was started with; empty if it is gone."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode("utf-8", "replace") for part in raw.split(b"\0")[:-1]]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each of `pids`; one that is gone or not ours is passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parent dies, so that none can slip away (Linux, prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def oom_kills() -> int:
    """How many processes the kernel's OOM killer has killed since boot, on the whole machine; 0 where it is not counted."""
    try:
        lines = (_PROC / "vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def wait_until_gone(pids: Iterable[int], timeout_seconds: float, every_seconds: float = 0.05) -> bool:
    """Whether all of `pids` were gone (or zombies) before `timeout_seconds` had passed."""
    watched = set(pids)
    deadline = time.monotonic() + timeout_seconds
    while True:
        watched = {pid for pid in watched if (stat := read_stat(pid)) is not None and not stat.is_zombie}
        if not watched or time.monotonic() >= deadline:
            return not watched
        time.sleep(every_seconds)


def _environment(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []
