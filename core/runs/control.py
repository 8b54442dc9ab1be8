"""What a person can do to a run that exists: stop it, delete it, bring it back. Writes intents; the supervisor acts on them."""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from core.errors import ConflictError, InputError, MachineError
from core.files import free_path, read_json, require_absent, write_json
from core.project import Project
from core.runs import processes
from core.runs.directory import RunDirectory
from core.runs.launch import start_supervisor
from core.runs.state import Phase, read_status

StopMode = Literal["save", "cancel"]
_ORIGIN_FILE: Final = ".danlu_origin"
"""Inside a folder in the trash: where it lay."""


@dataclass(frozen=True, slots=True)
class TrashEntry:
    """A run in the trash."""

    path: Path
    origin: Path
    """Where it lay, and where it goes back to."""
    deleted_at: float


def request_stop(run: RunDirectory, mode: StopMode) -> None:
    """Ask `run` to end: `save` lets it save and exit within its spec's stop_seconds, `cancel` ends it at once.

    A second call may turn `save` into `cancel`, not back. A run whose supervisor was killed gets a new one first, so that
    the request is carried out to the end. Raises ConflictError if it does not run, MachineError if the disk is full.
    """
    status = read_status(run)
    if not status.phase.is_active:
        raise ConflictError("runs.not_running", run=run.id)
    if not run.spec_file.exists():
        raise ConflictError("runs.not_ours", run=run.id)
    if status.stop_mode != "cancel":
        _write_request(run, mode, status.supervisor_pid)
    if not status.is_supervised:
        start_supervisor(run, is_adopting=True)


def delete(project: Project, run: RunDirectory) -> TrashEntry:
    """Move `run` to the project's trash. Raises ConflictError while it runs, or if the app did not make it."""
    if read_status(run).phase.is_active:
        raise ConflictError("runs.still_running", run=run.id)
    if not run.spec_file.exists():
        raise ConflictError("runs.not_ours", run=run.id)
    trash = _trash(project)
    trash.mkdir(parents=True, exist_ok=True)
    target = free_path(trash / run.id)
    write_json(run.path / _ORIGIN_FILE, {"origin": str(run.path), "deleted_at": time.time()})
    try:
        run.path.rename(target)
    except OSError as error:
        (run.path / _ORIGIN_FILE).unlink(missing_ok=True)
        raise MachineError("runs.cannot_move", path=str(run.path), reason=error.strerror or str(error)) from error
    return _entry(target)


def restore(entry: TrashEntry) -> RunDirectory:
    """Bring a run back to where it lay. Raises ConflictError if something else is there now."""
    require_absent(entry.origin)
    entry.origin.parent.mkdir(parents=True, exist_ok=True)
    try:
        entry.path.rename(entry.origin)
    except OSError as error:
        raise MachineError("runs.cannot_move", path=str(entry.path), reason=error.strerror or str(error)) from error
    (entry.origin / _ORIGIN_FILE).unlink(missing_ok=True)
    return RunDirectory(entry.origin)


def list_trash(project: Project) -> list[TrashEntry]:
    """Deleted runs, the latest first; one whose origin cannot be read stays where it is and is not listed."""
    entries = []
    for file in _trash(project).glob(f"*/{_ORIGIN_FILE}"):
        with suppress(InputError):
            entries.append(_entry(file.parent))
    return sorted(entries, key=lambda entry: entry.deleted_at, reverse=True)


def _trash(project: Project) -> Path:
    return project.private / "trash"


def _entry(path: Path) -> TrashEntry:
    value = read_json(path / _ORIGIN_FILE)
    try:
        return TrashEntry(path, Path(value["origin"]), float(value.get("deleted_at", 0.0)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("runs.broken_trash", path=str(path)) from error


def _write_request(run: RunDirectory, mode: StopMode, supervisor_pid: int | None) -> None:
    try:
        write_json(run.stop_file, {"mode": mode, "at": datetime.now(UTC).isoformat(timespec="seconds")})
    except MachineError:
        if mode != "cancel" or supervisor_pid is None:
            raise
        processes.send(
            [supervisor_pid], signal.SIGTERM
        )  # No room for a file: the supervisor takes a signal for a cancel.


def is_stoppable(run: RunDirectory, phase: Phase) -> bool:
    """Whether the app can stop it: it lives, and it is ours."""
    return phase.is_active and run.spec_file.exists()
