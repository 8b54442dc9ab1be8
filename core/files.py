"""Writing files so that nothing is ever half written or overwritten unseen. Stdlib only; every room may use it."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from core.errors import ConflictError, InputError, MachineError


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: a reader sees the old text or the new one, never a part.

    Raises MachineError on a full disk or in a folder that cannot be written; the old file is still there then, and nothing beside it.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise MachineError("files.cannot_write", path=str(path), reason=error.strerror or str(error)) from error


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with `value` as readable JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`. Raises InputError naming file, line and column when it is missing, broken or not to be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("files.missing", path=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError("files.not_utf8", path=str(path), offset=error.start) from error
    except json.JSONDecodeError as error:
        raise InputError(
            "files.broken_json", path=str(path), line=error.lineno, column=error.colno, reason=error.msg
        ) from error
    except RecursionError as error:
        raise InputError("files.broken_json", path=str(path), line=1, column=1, reason=str(error)) from error
    except OSError as error:
        raise InputError("files.unreadable", path=str(path), reason=error.strerror or str(error)) from error


def free_path(path: Path) -> Path:
    """`path` itself if nothing is there, else the first of `name_2`, `name_3`, … that is free."""
    if not path.exists():
        return path
    number = 2
    while (candidate := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    return candidate


def require_absent(path: Path) -> None:
    """Raises ConflictError if there is something at `path` (an empty folder is nothing)."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise ConflictError("files.exists", path=str(path))


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises MachineError if the disk of `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise MachineError(
            "files.no_space",
            path=str(existing),
            needed_gib=round(needed_bytes / 2**30, 2),
            free_gib=round(free_bytes / 2**30, 2),
        )


def within(path: Path, *roots: Path) -> Path:
    """`path` with links resolved, if it lies in one of `roots`; else InputError (path traversal, links that lead out)."""
    resolved = path.resolve()
    if any(resolved.is_relative_to(root.resolve()) for root in roots):
        return resolved
    raise InputError("files.outside", path=str(path), roots=", ".join(str(root) for root in roots))


def tree_size_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`, links followed."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
