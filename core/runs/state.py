"""What a run is doing, derived from its files and processes each time it is asked. Keeps nothing."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from core.runs import processes
from core.runs.devices import Holder
from core.runs.directory import RunDirectory
from core.runs.processes import ProcessIdentity

_START_SECONDS: Final = 30.0
"""How long a supervisor may take to write its first state.json."""
_QUIET_SECONDS: Final = 120.0
"""A work dir that was not made by the app counts as running while its files are younger than this."""
SUPERVISOR_MODULE: Final = "core.runs.supervisor"


class Phase(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    """Saved and ended on request."""
    CANCELLED = "cancelled"
    """Ended on request without saving."""
    FAILED = "failed"
    LOST = "lost"
    """state.json says running, but neither supervisor nor process lives (reboot, kill -9 of both)."""

    @property
    def is_active(self) -> bool:
        return self in (Phase.QUEUED, Phase.STARTING, Phase.RUNNING, Phase.STOPPING)


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A snapshot of one run."""

    phase: Phase
    pid: int | None = None
    """Of the process group's leader, while it lives."""
    started_at: float | None = None
    """Unix seconds."""
    ended_at: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    is_supervised: bool = True
    """False: the process lives, but its supervisor was killed; its exit code will stay unknown."""
    stop_mode: str | None = None
    """`save` or `cancel`, once a person asked for it and the supervisor has seen it."""
    stop_requested_at: float | None = None
    oom_kills: int = 0
    """Processes that the kernel's OOM killer ended on this machine while the run lived."""
    supervisor_pid: int | None = None
    stop_reason: str | None = None
    """Kind of the alert that stopped it; None: a person did."""
    queued_at: float | None = None
    waits_for: tuple[Holder, ...] = ()
    """While it is queued: the devices it waits for, and the runs that have them or come first."""
    gpu_bytes_left: int | None = None
    """GPU memory that was not given back after the end; None: not known."""
    energy_joules: float | None = None
    """What its GPUs took, over all attempts; known at the end."""
    peak_gpu_bytes: int | None = None
    """Most memory in use on one of its GPUs, as NVML saw it; known at the end."""
    earlier_seconds: float = 0.0
    """How long the attempts before this one ran."""

    def elapsed_seconds(self, now: float | None = None) -> float | None:
        """From the start to the end, or to now while it lives."""
        if self.started_at is None:
            return None
        end = self.ended_at
        if end is None:
            end = (time.time() if now is None else now) if self.phase.is_active else self.started_at
        return max(0.0, end - self.started_at)

    def total_seconds(self, now: float | None = None) -> float | None:
        """With what the attempts before this one took."""
        elapsed = self.elapsed_seconds(now)
        return None if elapsed is None else elapsed + self.earlier_seconds


def read_status(run: RunDirectory, is_alive: Callable[[ProcessIdentity], bool] = ProcessIdentity.is_alive) -> RunStatus:
    """What `run` is doing now. Never raises: a directory that cannot be read is LOST."""
    while (state := _read_state(run)) is not None:
        try:
            status = _from_state(state, is_alive)
        except (KeyError, TypeError, ValueError, AttributeError):
            break
        if status.phase is not Phase.LOST:
            return status
        # It may have ended, and written so, between our look at its file and the one at its processes.
        if _read_state(run) == state:
            return _just_started(run, status) if state["phase"] == "starting" else status
    return _without_state(run)


def read_attempt(run: RunDirectory) -> dict[str, Any]:
    """What attempt.json says: the run went on in its own folder. Empty for the first start, or if it cannot be read."""
    try:
        value = json.loads(run.attempt_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def process_identity(run: RunDirectory) -> ProcessIdentity | None:
    """The run's first process as the supervisor recorded it, alive or not."""
    state = _read_state(run) or {}
    process = state.get("process")
    return ProcessIdentity.from_json(process) if process else None


def is_supervised(run: RunDirectory) -> bool:
    """Whether state.json names a living supervisor of a run that has not ended."""
    try:
        state = _read_state(run) or {}
        return Phase(state["phase"]).is_active and ProcessIdentity.from_json(state["supervisor"]).is_alive()
    except (KeyError, TypeError, ValueError):
        return False


def find_supervisor(run: RunDirectory) -> int | None:
    """Pid of a living supervisor of `run`, found by its command line: for when state.json is missing or broken."""
    path = str(run.path)
    for stat in processes.all_processes():
        arguments = processes.command_line(stat.pid)
        if not stat.is_zombie and SUPERVISOR_MODULE in arguments and path in arguments:
            return stat.pid
    return None


def _read_state(run: RunDirectory) -> dict[str, Any] | None:
    try:
        value = json.loads(run.state_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _from_state(state: dict[str, Any], is_alive: Callable[[ProcessIdentity], bool]) -> RunStatus:
    phase = Phase(state["phase"])
    stop = state.get("stop") or {}
    process = ProcessIdentity.from_json(state["process"]) if state.get("process") else None
    supervisor = ProcessIdentity.from_json(state["supervisor"])
    is_supervised, pid = True, None
    if phase.is_active:
        is_process_alive = process is not None and is_alive(process)
        is_supervised = is_alive(supervisor)
        pid = process.pid if process is not None and is_process_alive else None
        if not is_supervised:
            # A waiting run whose supervisor is gone (reboot) never started: it is lost too, and can be started again.
            phase = Phase.LOST if not is_process_alive else (Phase.STOPPING if stop else Phase.RUNNING)
    return RunStatus(
        phase=phase,
        pid=pid,
        started_at=_number(state.get("started_at")),
        ended_at=_number(state.get("ended_at")),
        exit_code=state.get("exit_code"),
        signal=state.get("signal"),
        is_supervised=is_supervised,
        stop_mode=stop.get("mode"),
        stop_requested_at=_number(stop.get("requested_at")),
        oom_kills=int(state.get("oom_kills") or 0),
        supervisor_pid=supervisor.pid if phase.is_active and is_supervised else None,
        stop_reason=stop.get("reason"),
        queued_at=_number(state.get("queued_at")),
        waits_for=tuple(Holder(str(one["device"]), str(one["run"])) for one in state.get("waits_for") or []),
        gpu_bytes_left=state.get("gpu_bytes_left"),
        energy_joules=_number(state.get("energy_joules")),
        peak_gpu_bytes=state.get("peak_gpu_bytes"),
        earlier_seconds=float(state.get("earlier_seconds") or 0.0),
    )


def _just_started(run: RunDirectory, status: RunStatus) -> RunStatus:
    """A supervisor that was killed before it could note the process it had started: that one lives, and may be stopped."""
    leader = next(iter(processes.marked(str(run.path))), None)
    if leader is None:
        return status
    return replace(status, phase=Phase.RUNNING, pid=leader.pid, is_supervised=False)


def _number(value: object) -> float | None:
    """Raises TypeError for what is neither a number nor missing."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise TypeError(value)


def _without_state(run: RunDirectory) -> RunStatus:
    try:
        written_at = run.spec_file.stat().st_mtime
    except OSError:
        return _of_work_dir(run)
    supervisor = find_supervisor(run)
    if supervisor is not None:
        return RunStatus(Phase.RUNNING, started_at=written_at, supervisor_pid=supervisor)
    leader = next(iter(processes.marked(str(run.path))), None)
    if leader is not None:
        return RunStatus(Phase.RUNNING, pid=leader.pid, started_at=written_at, is_supervised=False)
    is_young = 0 <= time.time() - written_at < _START_SECONDS
    return RunStatus(Phase.STARTING if is_young else Phase.LOST, started_at=written_at)


def _of_work_dir(run: RunDirectory) -> RunStatus:
    """A work dir made by hand with `xtuner train`: nobody recorded its process, so the age of its files has to do."""
    try:
        times = [file.stat().st_mtime for file in run.path.glob("*/vis_data/scalars.json")]
    except OSError:
        times = []
    if not times:
        return RunStatus(Phase.LOST, is_supervised=False)
    last = max(times)
    if abs(time.time() - last) < _QUIET_SECONDS:  # a file from the future is no sign of life: a clock was set back
        return RunStatus(Phase.RUNNING, started_at=min(times), is_supervised=False)
    return RunStatus(Phase.FINISHED, ended_at=last, is_supervised=False)
