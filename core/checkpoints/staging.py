"""A folder that appears whole or not at all: written beside its target under a hidden name, synced, renamed at the end.

After a kill the hidden folder stays; work with the same plan goes on in it, other work throws it away.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import ConflictError, DanluError, MachineError
from core.files import read_json, require_absent, tree_size_bytes, write_json
from core.runs.processes import ProcessIdentity, identify

_PLAN: Final = ".plan.json"


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a killed process left of `target`."""

    target: Path
    size_bytes: int


def staging_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def left_bytes(target: Path) -> int:
    """What lies on the disk of `target` already, or is thrown away before it is written anew: needs no more space."""
    return tree_size_bytes(staging_folder(target))


def leftovers(folder: Path) -> list[Leftover]:
    """Unfinished work in `folder` that no living process writes."""
    found = sorted(part for part in folder.glob(".*.part") if part.is_dir() and not _is_another(_record(part)))
    targets = [folder / part.name.removeprefix(".").removesuffix(".part") for part in found]
    return [Leftover(target, left_bytes(target)) for target in targets]


def remove_leftover(target: Path) -> None:
    """Raises ConflictError `checkpoints.being_written` if a living process writes it, MachineError."""
    part = staging_folder(target)
    if _is_another(_record(part)):
        raise ConflictError("checkpoints.being_written", path=str(part))
    with writing(target):
        shutil.rmtree(part)


@contextmanager
def stage(target: Path, plan: Any) -> Iterator[Path]:
    """Give a folder to write in; on success it becomes `target`, on any error it is removed.

    `plan`: JSON that says what is being made. A folder left by a killed process with the same plan is given again, with what it holds.
    Raises ConflictError if `target` exists or another live process writes it, MachineError if the disk is full or read-only.
    """
    require_absent(target)
    part = staging_folder(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _claim(part, plan)
    try:
        with writing(target):
            yield part
            (part / _PLAN).unlink()
            _sync_tree(part)
            if target.is_dir():
                target.rmdir()
            part.rename(target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn errors of the disk into errors for people."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError("checkpoints.disk_full", path=str(target)) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise MachineError("checkpoints.read_only", path=str(target.parent)) from error
        raise MachineError("checkpoints.cannot_write", path=str(target), reason=error.strerror or str(error)) from error


def _claim(part: Path, plan: Any) -> None:
    """Make `part` ours: fresh, or the one a killed process with the same plan left."""
    if part.exists():
        left = _record(part)
        if _is_another(left):
            raise ConflictError("checkpoints.being_written", path=str(part))
        if left.get("plan") != plan:
            shutil.rmtree(part)
    part.mkdir(exist_ok=True)
    own = identify(os.getpid())
    write_json(part / _PLAN, {"process": own.to_json() if own else None, "plan": plan})


def _record(part: Path) -> dict[str, Any]:
    """Who writes `part`, and what; empty where that cannot be read."""
    try:
        record = read_json(part / _PLAN)
    except DanluError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_another(record: dict[str, Any]) -> bool:
    """Whether a living process other than this one is writing."""
    try:
        process = ProcessIdentity.from_json(record["process"])
    except (KeyError, TypeError, ValueError):
        return False
    return process.pid != os.getpid() and process.is_alive()


def _sync_tree(folder: Path) -> None:
    """Bring every file to the disk before the folder gets its name: after a power cut there is no whole-looking folder with empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
