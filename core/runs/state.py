"""What a run is doing, derived from its files and processes each time it is asked. Keeps nothing."""

from dataclasses import dataclass
from enum import StrEnum

from core.runs.directory import RunDirectory


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


def read_status(run: RunDirectory) -> RunStatus:
    raise NotImplementedError
