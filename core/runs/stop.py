"""How a run is ended: the request of a person or the watch, SIGTERM and SIGKILL in their time, and what that makes of it. Stdlib only."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.runs.members import POLL_SECONDS, Members

KILL_SECONDS: Final = 15.0
"""From SIGTERM to SIGKILL."""
EXIT_EXPLAINED: Final = 3
"""A job's own exit code for an error it explained (core.runs.job), which is how it answers a stop."""
_LEFTOVER_SECONDS: Final = 2.0
"""How long children may outlive the first process before they are told to end."""
_GIVE_UP_SECONDS: Final = 60.0
"""After this even SIGKILL has not helped: the process hangs in the kernel, and the run's end is written all the same."""


@dataclass
class Stop:
    """A stop that was asked for."""

    mode: str
    """`save` or `cancel`."""
    requested_at: float
    reason: str | None = None
    """Kind of the alert that asked for it; None: a person did."""
    began: float = field(default_factory=time.monotonic)
    terminated: float | None = None
    """Monotonic time of SIGTERM."""
    is_killed: bool = False

    def escalate(self, members: Members, stop_seconds: float) -> bool:
        """Waiting for the save → SIGTERM → SIGKILL. Whether a signal was sent now."""
        now = time.monotonic()
        if self.terminated is None and (self.mode == "cancel" or now - self.began > stop_seconds):
            self.terminated = now
            members.send(signal.SIGTERM)
            return True
        if self.is_time_to_kill(now) and not self.is_killed:
            self.is_killed = True
            members.send(signal.SIGKILL)
            return True
        return False

    def is_time_to_kill(self, now: float) -> bool:
        return self.terminated is not None and now - self.terminated > KILL_SECONDS

    def to_json(self) -> dict[str, Any]:
        sent = "SIGKILL" if self.is_killed else "SIGTERM" if self.terminated is not None else None
        return {"mode": self.mode, "requested_at": self.requested_at, "reason": self.reason, "sent": sent}


def end_leftovers(members: Members, stop: Stop | None, clock: Callable[[], float] = time.monotonic) -> None:
    """The first process has ended: whatever it left behind must end too, in its own time, by SIGTERM, by SIGKILL."""
    began = clock()
    has_terminated = has_killed = False
    while members.living() and (elapsed := (now := clock()) - began) < _GIVE_UP_SECONDS:
        if not has_terminated and elapsed > _LEFTOVER_SECONDS:
            has_terminated = True
            members.send(signal.SIGTERM)
        was_told = stop is not None and stop.terminated is not None
        if stop.is_time_to_kill(now) if stop and was_told else elapsed > _LEFTOVER_SECONDS + KILL_SECONDS:
            has_killed = True
            members.send(signal.SIGKILL)
        members.wait(0.05 if has_killed else POLL_SECONDS)


def final_phase(stop: Stop | None, code: int | None, *, is_adopting: bool) -> str:
    """What a run was that ended with exit code `code` (None: by a signal, or nobody was told)."""
    if stop is None:
        if code is None and is_adopting:
            return "lost"  # Only a parent is told how a process ended.
        return "finished" if code == 0 else "failed"
    has_signalled = stop.terminated is not None
    if is_adopting:
        return "cancelled" if has_signalled else "stopped"
    if code == 0 and not has_signalled:
        return "stopped" if stop.mode == "save" else "finished"
    return "cancelled" if has_signalled or code == EXIT_EXPLAINED else "failed"


def requested(stop_file: Path) -> tuple[str, str | None] | None:
    """Mode and reason of the request in `stop_file`; None if there is none. One that cannot be read is the gentler one."""
    try:
        request = json.loads(stop_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ("save", None) if stop_file.exists() else None
    if not isinstance(request, dict):
        return "save", None
    reason = request.get("reason")
    return "cancel" if request.get("mode") == "cancel" else "save", reason if isinstance(reason, str) else None
