"""Runs one core function as a job: `python -m core.runs.job RUN_DIR`.

The job's run.json names the function (`details.function`, "core.models.library:copy_model") and its arguments
(`details.arguments`, JSON). The function gets them as keywords, plus `progress`. What it returns (JSON) goes to
result.json; a DanluError goes to error.json and exit code 3. Anything else is a defect: a traceback in the log, exit code 1.
"""

import importlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError, JobError
from core.files import write_json
from core.i18n import catalog
from core.messages import Message
from core.runs.directory import RunDirectory
from core.runs.pace import Pace

EXIT_OK: Final = 0
EXIT_EXPLAINED: Final = 3
_WRITE_EVERY_SECONDS: Final = 0.2
_WRITING_SHARE: Final = 0.1
"""Part of the time that noting the progress may take."""


class Progress:
    """How far a job is. Writes progress.json at most five times a second; says when a person wants it to stop."""

    def __init__(self, run: RunDirectory, now: Callable[[], float] = time.monotonic) -> None:
        self._run, self._now = run, now
        self._started_at = time.time()
        self._written: float | None = None
        """By `now`: a clock that is set back must not silence a job."""
        self._phase: str | None = None
        self._first_done: float | None = None
        self._looking, self._writing = Pace(now=now), Pace(_WRITING_SHARE, now=now)

    def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
        """Say that `done` of `total` (None: not known) is done. `unit`: "bytes", "rows", "tensors" or "".

        Raises JobError `runs.cancelled` if a person asked to stop: let it pass through, clean up in `finally`.
        """
        self.check()
        is_last = total is not None and done >= total
        if message.key == self._phase and not is_last and not self._is_due():
            return
        self._written, self._phase, now = self._now(), message.key, time.time()
        if self._first_done is None and total is not None:
            self._first_done, self._started_at = done, now
        value = {
            "done": done,
            "first_done": self._first_done or 0,
            "total": total,
            "unit": unit,
            "message": message.to_json(),
            "started_at": self._started_at,
            "at": now,
        }
        with self._writing.taken():
            write_json(self._run.progress_file, value)

    def _is_due(self) -> bool:
        is_old = self._written is None or self._now() - self._written >= _WRITE_EVERY_SECONDS
        return is_old and self._writing.is_due()

    def check(self) -> None:
        """Raises JobError `runs.cancelled` if a person asked to stop; on a slow disk it looks every few seconds only."""
        if not self._looking.is_due():
            return
        with self._looking.taken():
            is_asked = self._run.stop_file.exists()
        if is_asked:
            raise JobError("runs.cancelled")


class SilentProgress(Progress):
    """For tests and command lines: writes nothing, never stops."""

    def __init__(self) -> None:
        pass

    def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
        del done, total, message, unit

    def check(self) -> None:
        pass


def resolve(name: str) -> Callable[..., Any]:
    """The function behind "core.room.module:function". Only functions of core can be named."""
    module, _, attribute = name.partition(":")
    if module.split(".")[0] != "core" or not attribute:
        raise ValueError(f"not a function of core: {name!r}")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def main(argv: list[str]) -> int:
    run = RunDirectory(Path(argv[0]))
    details = run.spec().details
    signal.signal(signal.SIGTERM, _cancel)
    try:
        result = resolve(details["function"])(**details["arguments"], progress=Progress(run))
    except DanluError as error:
        what, next_step = catalog("en").explain(error)
        print(f"{error.code}: {what} {next_step}", file=sys.stderr)
        write_json(run.error_file, error.to_json())
        return EXIT_EXPLAINED
    write_json(run.result_file, result)
    return EXIT_OK


def _cancel(*_: object) -> None:
    """SIGTERM ends a job like any error does, so that it cleans up what it has half written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise JobError("runs.cancelled")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
