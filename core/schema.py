"""Versions of the app's own JSON files: older ones are brought forward when they are read, newer ones are refused in words.

A file says `schema_version`; one without it is version 0. Stdlib only; what a version holds is known by the file's own room.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.errors import InputError, MachineError
from core.files import read_json, write_json

Step = Callable[[Any], dict[str, Any]]
"""Makes of what one version holds what the next one holds."""


def upgraded(value: Any, path: Path, current: int, steps: Mapping[int, Step]) -> dict[str, Any]:
    """`value`, read from `path`, as version `current` says it; `steps` by the version they start from.

    Raises InputError `files.newer_schema` for a file of a newer app, `files.broken_schema` for one that no step can read.
    """
    found = version_of(value)
    if found is None:
        raise InputError("files.broken_schema", path=str(path), reason="schema_version")
    if found > current:
        raise InputError("files.newer_schema", path=str(path), version=found, current=current)
    try:
        for version in range(found, current):
            value = {**steps[version](value), "schema_version": version + 1}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("files.broken_schema", path=str(path), reason=f"{type(error).__name__}: {error}") from error
    return dict(value)


def read_upgraded(path: Path, current: int, steps: Mapping[int, Step]) -> dict[str, Any]:
    """What `path` holds, as `current` says it. An older file is rewritten, its old self kept beside it as `<name>.v<version>`.

    In a folder that cannot be written the old file stays and is read all the same. Raises InputError like `upgraded`.
    """
    before = read_json(path)
    value = upgraded(before, path, current, steps)
    if value != before:
        try:
            kept = path.with_name(f"{path.name}.v{version_of(before)}")
            if not kept.exists():
                shutil.copy2(path, kept)
            write_json(path, value)
        except (OSError, MachineError):
            return value
    return value


def version_of(value: Any) -> int | None:
    """0 for a file from before versions, None for a version that is no number."""
    found = value.get("schema_version", 0) if isinstance(value, dict) else 0
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None
