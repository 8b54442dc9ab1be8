"""Where the time goes between the start of a run and its first step: `startup.json`, written by the trainer. Stdlib only.

The trainer imports this module before anything else, so that the imports are measured too.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import InputError
from core.files import read_json, write_json

STARTUP_FILE: Final = "startup.json"
PHASES: Final = ("process", "imports", "config", "model", "data", "setup", "answers", "first_step")
"""In their order. `process`: from the supervisor's start of it to the first line of ours; `setup`: all that has no name."""


class Clock:
    """Adds up seconds by phase. Time inside a `span` counts to its phase, the rest to the phase that `until` names next."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.began_at = time.time()
        self._now = now
        self._mark = now()
        self._in_spans = 0.0
        self._is_inside = False
        self.seconds: dict[str, float] = {}

    def until(self, phase: str) -> None:
        """Everything since the last mark was `phase`, but what spans took of it."""
        now = self._now()
        self._add(phase, now - self._mark - self._in_spans)
        self._mark, self._in_spans = now, 0.0

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """A span within another belongs to the outer one."""
        if self._is_inside:
            yield
            return
        self._is_inside, begun = True, self._now()
        try:
            yield
        finally:
            took = self._now() - begun
            self._add(phase, took)
            self._in_spans += took
            self._is_inside = False

    def write(self, run: Path) -> None:
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        write_json(run / STARTUP_FILE, {"began_at": round(self.began_at, 3), "seconds": seconds})

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


clock: Final = Clock()
"""This process's own: it runs from the import of this module."""


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds by phase, in the order of PHASES."""

    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def read_startup(run: Path, started_at: float | None) -> Startup | None:
    """What startup.json of a run folder says; None before the first step, or if the file is not ours.

    started_at: when the supervisor started the process. A clock that was set back since then leaves `process` out.
    """
    try:
        value = read_json(run / STARTUP_FILE)
        seconds = {name: float(value["seconds"][name]) for name in PHASES if name in value["seconds"]}
        process_seconds = float(value["began_at"]) - started_at if started_at is not None else 0.0
    except (InputError, KeyError, TypeError, ValueError):
        return None
    return Startup(({"process": process_seconds} if process_seconds > 0 else {}) | seconds)
