"""Many people at once: 20 browser sessions, five trainings that run, a long history, a million steps. Pages' times, CPU, memory.

The sessions speak Streamlit's own protocol: a browser is heavier than the server that it is to measure. `--minutes 60` makes it a
soak: the same, for longer.
"""

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.monitor import STEPS
from benchmarks.pages import free_port, serve, wait_until_it_listens, write_finished_run, write_project
from benchmarks.result import Result

_ROOT: Final = Path(__file__).parents[1]
_TRAINER: Final = _ROOT / "tests/core/runs/echo_trainer.py"
SESSIONS: Final = 20
TRAININGS: Final = 5
HISTORY: Final = 100
_SHORT_STEPS: Final = 200
_MINUTES: Final = 1.5
_THINKING_SECONDS: Final = 5.0
"""Mean time between two clicks of one person."""
_MIB: Final = 2**20


def run(minutes: float = _MINUTES) -> Result:
    """Half of the time a page for each session, the other half every session on one running training."""
    seconds = 30 * minutes
    with tempfile.TemporaryDirectory() as home, _server(Path(home)) as server:
        pages = asyncio.run(_drive(server, _one_page_each(), seconds))
        tabs = asyncio.run(_drive(server, [("monitor", "run=running_0")] * SESSIONS, seconds))
    return Result(
        {
            "sessions": SESSIONS,
            "minutes": minutes,
            **{f"pages_{key}": value for key, value in pages.items()},
            **{f"tabs_{key}": value for key, value in tabs.items()},
        },
        {
            "pages_rerun_p95_milliseconds": ("<", 500.0),
            "pages_failed_sessions": ("==", 0),
            "tabs_rerun_p95_milliseconds": ("<", 500.0),
            "tabs_server_cores": ("<", 1.0),
            "tabs_failed_sessions": ("==", 0),
            "tabs_memory_growth_mebibytes": ("<", 64.0),
        },
    )


@dataclass(slots=True)
class _Server:
    """The app under load."""

    port: int
    pid: int

    @property
    def cpu_seconds(self) -> float:
        import psutil

        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)

    @property
    def memory_bytes(self) -> int:
        import psutil

        return int(psutil.Process(self.pid).memory_info().rss)


@contextmanager
def _server(home: Path) -> Iterator[_Server]:
    """A project as after months, trainings that run, and a server on it; all ended afterwards."""
    from core.runs.devices import SLOTS_VARIABLE

    os.environ |= {"DANLU_DEVICES": str(home / "devices"), SLOTS_VARIABLE: str(TRAININGS)}
    project = home / "months"
    write_project(project)
    for number in range(HISTORY - 1):
        write_finished_run(project, f"old_{number}", f"2024-{number // 28 + 1:02d}-{number % 28 + 1:02d}", _SHORT_STEPS)
    write_finished_run(project, "million", "2024-12-01", STEPS)
    runs = _start_trainings(project)
    port = free_port()
    process = serve(str(home), port)
    try:
        wait_until_it_listens(port)
        yield _Server(port, process.pid)
    finally:
        process.kill()
        process.wait()
        _end(runs)


def _start_trainings(project: Path) -> list[Any]:
    from core.runs.directory import RunSpec
    from core.runs.launch import launch, now_utc

    runs = []
    for number in range(TRAININGS):
        folder = project / "train" / f"running_{number}"
        arguments = ["--steps", "1000000", "--step-seconds", "0.2"]
        spec = RunSpec(
            id=folder.name,
            kind="train",
            title="tiny",
            argv=[sys.executable, str(_TRAINER), str(folder), *arguments],
            cwd=str(project),
            created_at=now_utc(),
        )
        runs.append(launch(folder.parent, spec))
    return runs


def _end(runs: list[Any]) -> None:
    from core.runs.control import request_stop
    from core.runs.state import read_status

    for started in runs:
        request_stop(started, "cancel")
    deadline = time.monotonic() + 60
    while any(read_status(started).phase.is_active for started in runs) and time.monotonic() < deadline:
        time.sleep(0.2)


def _one_page_each() -> list[tuple[str, str]]:
    """(page, query): every page of the app in turn; the monitors show the run of a million steps and running ones."""
    from pages.ui.page_table import PAGES

    names = list(PAGES)
    queries = iter(["run=million", *(f"run=running_{number}" for number in range(TRAININGS))])
    return [
        (names[at % len(names)], next(queries) if names[at % len(names)] == "monitor" else "") for at in range(SESSIONS)
    ]


async def _drive(server: _Server, places: list[tuple[str, str]], seconds: float) -> dict[str, float]:
    """All sessions for `seconds`; they come one after the other, so that everything counts from the end of the first third."""
    visitors = [_Visitor(server.port, page, query, random.Random(at)) for at, (page, query) in enumerate(places)]
    tasks = [asyncio.create_task(visitor.stay(seconds)) for visitor in visitors]
    await asyncio.sleep(seconds / 3)
    started, cpu, settled = time.monotonic(), server.cpu_seconds, server.memory_bytes
    for visitor in visitors:
        visitor.times.clear()
    await asyncio.sleep(max(0.0, 2 * seconds / 3 - 1))
    cores = (server.cpu_seconds - cpu) / (time.monotonic() - started)
    grown = server.memory_bytes - settled
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for visitor, result in zip(visitors, results, strict=True):
        if isinstance(result, BaseException):
            print(f"{visitor.page}: {type(result).__name__}: {result}", file=sys.stderr)
    for name in sorted({visitor.page for visitor in visitors}):
        times = [value for visitor in visitors if visitor.page == name for value in visitor.times]
        print(f"{name}: {len(times)} reruns, p95 {_p95(times) * 1000:.0f} ms", file=sys.stderr)
    every = [value for visitor in visitors for value in visitor.times]
    return {
        "slowest_opening_milliseconds": round(max(visitor.opened for visitor in visitors) * 1000),
        "reruns": len(every),
        "rerun_p50_milliseconds": round(statistics.median(every) * 1000, 1) if every else 0.0,
        "rerun_p95_milliseconds": round(_p95(every) * 1000, 1),
        "server_cores": round(cores, 2),
        "memory_mebibytes": round(server.memory_bytes / _MIB),
        "memory_growth_mebibytes": round(grown / _MIB, 1),
        "failed_sessions": sum(isinstance(result, BaseException) for result in results),
    }


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))] if values else 0.0


@dataclass(slots=True)
class _Visitor:
    """One browser session on one page: opens it, follows its timers, and clicks (reruns the page) now and then."""

    port: int
    page: str
    query: str
    chance: random.Random
    opened: float = 0.0
    """Seconds of the first run: it imports the page and reads the files, for the sessions that follow too."""
    times: list[float] = field(default_factory=list)
    _timers: dict[str, float] = field(default_factory=dict)
    """Fragment → seconds between its reruns."""
    _page_hash: str = ""

    async def stay(self, seconds: float) -> None:
        """Raises RuntimeError if the page is not there or shows an exception, OSError if the server ends the connection."""
        from websockets.asyncio.client import connect
        from websockets.typing import Origin, Subprotocol

        url = f"ws://127.0.0.1:{self.port}/_stcore/stream"
        async with connect(
            url, subprotocols=[Subprotocol("streamlit")], max_size=None, origin=Origin(f"http://127.0.0.1:{self.port}")
        ) as socket:
            ends_at = time.monotonic() + seconds
            await asyncio.sleep(self.chance.uniform(0, min(5.0, seconds / 6)))
            self.opened = await self._rerun(socket)
            due = {"": time.monotonic() + self._pause()}
            while (now := time.monotonic()) < ends_at:
                for fragment, interval in self._timers.items():
                    due.setdefault(fragment, now + interval)
                fragment = min(due, key=due.__getitem__)
                await asyncio.sleep(max(0.0, min(due[fragment], ends_at) - now))
                if time.monotonic() >= ends_at:
                    return
                self.times.append(await self._rerun(socket, fragment))
                pause = self._timers.get(fragment) if fragment else self._pause()
                due = {name: at for name, at in due.items() if name in self._timers or not name}
                if pause is not None:
                    due[fragment] = time.monotonic() + pause

    def _pause(self) -> float:
        return self.chance.uniform(0.5, 1.5) * _THINKING_SECONDS

    async def _rerun(self, socket: Any, fragment: str = "") -> float:
        """Seconds from the request to the end of the script run, with everything that it draws received."""
        from streamlit.proto.BackMsg_pb2 import BackMsg
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

        request = BackMsg()
        request.rerun_script.query_string = f"lang=en&project=months&{self.query}"
        request.rerun_script.page_name = "" if self._page_hash else self.page
        request.rerun_script.page_script_hash = self._page_hash
        request.rerun_script.fragment_id = fragment
        request.rerun_script.is_auto_rerun = bool(fragment)
        started = time.perf_counter()
        if not fragment:
            self._timers.clear()
        await socket.send(request.SerializeToString())
        while True:
            message = ForwardMsg.FromString(await asyncio.wait_for(socket.recv(), 60))
            kind = message.WhichOneof("type")
            if kind == "navigation":
                self._page_hash = message.navigation.page_script_hash
            elif kind == "auto_rerun":
                self._timers[message.auto_rerun.fragment_id] = message.auto_rerun.interval
            elif kind == "page_not_found" or (kind == "delta" and message.delta.new_element.HasField("exception")):
                raise RuntimeError(f"{kind} {message.delta.new_element.exception.message}")
            elif kind == "script_finished":
                return time.perf_counter() - started
