"""A project on a disk on which every operation takes 50 or 200 ms, as a network share may be: pages, start and stop of a run.

Slowed down is what Python asks the disk for below the project's folder, in this process (the pages) and in the supervisor and the
trainer (`tests.slow_disk`). The trainer is the stdlib one of the tests: what is measured is the app, not XTuner.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.pages import write_finished_run, write_project
from benchmarks.result import Result
from core.runs.control import request_stop
from core.runs.devices import FOLDER_VARIABLE
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, now_utc
from core.runs.state import read_status
from core.runs.watch import read_alerts

_ROOT: Final = Path(__file__).parents[1]
_TRAINER: Final = _ROOT / "tests/core/runs/echo_trainer.py"
_PAGES: Final = ("start", "launch", "monitor", "runs", "export")
_PAGE_SECONDS: Final = 0.05
_DELAYS: Final = (0.0, 0.05, 0.2)
"""Of a run; the first is the disk as it is."""
_RUNS: Final = 20
_STEPS: Final = 200
_WATCHED_SECONDS: Final = 15.0
_GIVE_UP_SECONDS: Final = 120.0


def run() -> Result:
    figures: dict[str, float | int | str | None] = {"operation_milliseconds": 1000 * _PAGE_SECONDS, "runs": _RUNS}
    with tempfile.TemporaryDirectory() as home:
        os.environ[FOLDER_VARIABLE] = str(Path(home, "devices"))
        project = Path(home, "share")
        write_project(project)
        for number in range(_RUNS):
            write_finished_run(project, f"old_{number}", f"2024-01-{number + 1:02d}", _STEPS)
        figures |= _pages(project)
        for delay in _DELAYS:
            figures |= _life(project, Path(home, f"disk_{delay}"), delay)
    slowest = f"{round(1000 * _DELAYS[-1])}ms"
    return Result(
        figures,
        {
            "monitor_rerun_seconds": ("<", 10.0),
            f"stop_{slowest}_seconds": ("<", 10.0),
            f"alerts_{slowest}": ("==", 0),
            f"supervisor_operations_{slowest}_per_minute": ("<", 600),
        },
    )


def _pages(project: Path) -> dict[str, float | int]:
    """Seconds and operations of a rerun, after the first run of a page has filled the caches."""
    from streamlit.testing.v1 import AppTest

    from pages.ui.page_table import PAGES
    from tests.slow_disk import SlowDisk

    logging.disable(logging.WARNING)  # Streamlit tells that there is no browser, at every call
    found: dict[str, float | int] = {}
    for page in _PAGES:
        app = AppTest.from_file(str(_ROOT / "app.py"), default_timeout=600)
        app.session_state["project_root"] = str(project)
        app.run().switch_page(PAGES[page]).run()
        with SlowDisk(project, _PAGE_SECONDS) as disk:
            begun = time.perf_counter()
            app.run()
            seconds = time.perf_counter() - begun
        if app.exception:
            raise RuntimeError(f"{page}: {app.exception[0].value}")
        found |= {f"{page}_rerun_seconds": round(seconds, 2), f"{page}_operations": disk.count}
        print(f"{page}: {disk.count} operations, {seconds:.1f} s", file=sys.stderr, flush=True)
    logging.disable(logging.NOTSET)
    return found


def _life(project: Path, disk: Path, delay: float) -> dict[str, float | int]:
    """From the click to the first step, then some time of training, and from the click to the end of a run that saves."""
    from tests.slow_disk import calls_of

    name = f"{round(1000 * delay)}ms"
    folder = project / "train" / f"life_{name}"
    spec = RunSpec(
        id=folder.name, kind="train", title="life", cwd=str(project), created_at=now_utc(),
        argv=[sys.executable, str(_TRAINER), str(folder), "--steps", "1000000"],
    )  # fmt: skip
    with _environment(project, delay, disk):
        begun = time.monotonic()
        started = launch(folder.parent, spec)
        _wait(started.metrics_file.exists)
        first_step = time.monotonic() - begun
        asked = len(calls_of("supervisor.py", disk))
        time.sleep(_WATCHED_SECONDS)
        asked = len(calls_of("supervisor.py", disk)) - asked
        begun = time.monotonic()
        request_stop(started, "save")
        _wait(lambda: not read_status(started).phase.is_active)
    ended = read_status(started)
    print(f"{name}: {ended.phase}, first step after {first_step:.1f} s", file=sys.stderr, flush=True)
    return {
        f"first_step_{name}_seconds": round(first_step, 2),
        f"stop_{name}_seconds": round(time.monotonic() - begun, 2),
        f"alerts_{name}": len(read_alerts(RunDirectory(folder))[0]) + (ended.phase.value != "stopped"),
        f"supervisor_operations_{name}_per_minute": round(asked * 60 / _WATCHED_SECONDS),
    }


@contextmanager
def _environment(project: Path, delay: float, folder: Path) -> Iterator[None]:
    """The processes that are started meanwhile find the disk slow."""
    from tests.slow_disk import environment

    before = dict(os.environ)
    os.environ.update(environment(project, delay, folder))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _wait(is_true: Any) -> None:
    deadline = time.monotonic() + _GIVE_UP_SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError("the run hangs")
        time.sleep(0.02)
