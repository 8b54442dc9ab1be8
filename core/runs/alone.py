"""One at a time: of the tabs and servers that start the same run at the same moment, the first. Knows locks, not what is started."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConflictError, MachineError
from core.runs import processes
from core.runs.directory import RunDirectory
from core.runs.processes import ProcessIdentity


@contextmanager
def alone(run: RunDirectory, lock_file: Path) -> Iterator[None]:
    """Nobody else holds `lock_file`, which lies in the run's folder, meanwhile.

    The lock is the kernel's: it goes when its holder ends, however that ends. Where the file system keeps none (NFS without its lock
    service), a file beside it does, which names its process: one that is dead is in nobody's way.
    Raises ConflictError `runs.already_started` if someone has it, MachineError if the folder cannot be written.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = open(lock_file, "ab")  # noqa: SIM115 - closed below; its own errors are another matter
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(run.path), reason=error.strerror or str(error)) from error
    with lock:
        claim = None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError("runs.already_started", run=run.id) from error
        except OSError:
            claim = _claim(run, lock_file.with_suffix(".claim"))
        try:
            yield
        finally:
            if claim is not None:
                claim.unlink(missing_ok=True)


def _claim(run: RunDirectory, file: Path) -> Path:
    """Make `file`, which only one can, on NFS too (open(2): O_EXCL, since NFSv3).

    Two who find one of a dead process in the same moment are not told apart.
    """
    me = processes.identify(os.getpid())
    for _ in range(2):
        try:
            with open(file, "x", encoding="ascii") as stream:
                json.dump(me.to_json() if me else None, stream)
        except FileExistsError as error:
            if not _is_left_behind(file):
                raise ConflictError("runs.already_started", run=run.id) from error
            file.unlink(missing_ok=True)
        except OSError as error:
            raise MachineError("files.cannot_write", path=str(file), reason=error.strerror or str(error)) from error
        else:
            return file
    raise ConflictError("runs.already_started", run=run.id)


def _is_left_behind(file: Path) -> bool:
    """Whether the process that made it is dead. One that cannot be read is being written."""
    try:
        return not ProcessIdentity.from_json(json.loads(file.read_text(encoding="ascii"))).is_alive()
    except (OSError, ValueError, KeyError, TypeError):
        return False
