"""What earlier runs took against their estimate, remembered for a model, a card and a way to train. One small JSON file a project."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

from core.errors import InputError
from core.files import read_json, write_json
from core.project import Project

_KEPT: Final = 5
_BOUNDS: Final = (0.5, 2.0)
"""A ratio beyond them comes from something else on the card, or from another path: it corrects nothing."""


class Entry(TypedDict):
    """One remembered run."""

    run: str
    ratio: float


@dataclass(frozen=True, slots=True)
class Key:
    """What a correction holds for."""

    model: str
    """Fingerprint of the base model."""
    card: str
    """Name of the GPU."""
    way: str
    """Method and engine: `qlora/deepspeed`."""

    def __str__(self) -> str:
        return " | ".join((self.model, self.card, self.way))


def correction(project: Project, key: Key) -> float:
    """Median of measured over estimated of the last runs; 1.0 where there are none."""
    ratios = [entry["ratio"] for entry in _read(project).get(str(key), [])]
    return statistics.median(ratios) if ratios else 1.0


def remember(project: Project, key: Key, *, run: str, estimated_bytes: int, measured_bytes: int) -> None:
    """Keep one run's ratio; a run that is remembered already is replaced. Ratios out of all proportion are left aside."""
    ratio = measured_bytes / max(1, estimated_bytes)
    if not _BOUNDS[0] <= ratio <= _BOUNDS[1]:
        return
    known = _read(project)
    others = [entry for entry in known.get(str(key), []) if entry["run"] != run]
    entries = [*others, Entry(run=run, ratio=round(ratio, 4))][-_KEPT:]
    if entries != known.get(str(key)):
        write_json(_file(project), {**known, str(key): entries})


def _file(project: Project) -> Path:
    return project.private / "memory.json"


def _read(project: Project) -> dict[str, list[Entry]]:
    """A file that is missing or broken holds no corrections."""
    try:
        value = read_json(_file(project)) if _file(project).is_file() else {}
    except InputError:
        return {}
    known = value.items() if isinstance(value, dict) else ()
    return {key: entries for key, entries in known if isinstance(entries, list) and all(map(_is_entry, entries))}


def _is_entry(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("run"), str) and isinstance(value.get("ratio"), int | float)
