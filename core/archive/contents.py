"""What of a project goes into an archive, and what may come out of one. Knows places and names; opens nothing.

No weights, and nothing that another machine or person must decide anew: which Python trains, whose code may run, addresses of webhooks.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from core.data.library import SUFFIXES as DATA_SUFFIXES
from core.files import within
from core.project import Project

MANIFEST: Final = "danlu-project.json"
SCHEMA_VERSION: Final = 1
GROUPS: Final = ("config", "recipes", "runs", "data", "conversations")
_CONFIG_SUFFIXES: Final = (".py", ".json")
_RUN_SUFFIXES: Final = (".json", ".jsonl", ".log", ".py", ".txt", ".toml", ".yaml", ".sbatch")
_CHECKPOINTS: Final = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
"""A folder of this name is a checkpoint of many files, whose JSON belongs to the weights."""
_PRIVATE: Final = {"recipes": "recipes", "data": "recipes", "chat": "conversations"}
"""Folder in `.danlu` → group. Of these, JSON files that lie in it directly."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a person wants in the archive besides configs, recipes and runs."""

    data: tuple[str, ...] = ()
    """Data files, relative to `data/`."""
    has_conversations: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Member:
    """A file and its place in the archive, relative to the project."""

    path: Path
    place: str
    group: str
    size_bytes: int


@dataclass(slots=True)
class Count:
    """How much of one group there is."""

    files: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class Plan:
    """What an archive will hold, before it is written; what it holds, before it is unpacked."""

    groups: dict[str, Count] = field(default_factory=lambda: {name: Count() for name in GROUPS})

    def add(self, group: str, size_bytes: int) -> None:
        self.groups[group].files += 1
        self.groups[group].size_bytes += size_bytes

    @property
    def files(self) -> int:
        return sum(count.files for count in self.groups.values())

    @property
    def size_bytes(self) -> int:
        """Before compression."""
        return sum(count.size_bytes for count in self.groups.values())


def members(project: Project, choice: Choice) -> list[Member]:
    """Files of `project` for an archive, by place. Links that lead out of it are left alone. Raises InputError for such data."""
    found = []
    for file in _candidates(project, choice):
        place = file.relative_to(project.root).as_posix()
        group = group_of(place)
        if group is not None and file.is_file() and file.resolve().is_relative_to(project.root.resolve()):
            found.append(Member(file, place, group, file.stat().st_size))
    for name in choice.data:
        file = within(project.data / name, project.data)
        place = f"data/{name}"
        if group_of(place) == "data" and file.is_file():
            found.append(Member(file, place, "data", file.stat().st_size))
    return sorted({member.place: member for member in found}.values(), key=lambda member: member.place)


def plan_export(project: Project, choice: Choice) -> Plan:
    plan = Plan()
    for member in members(project, choice):
        plan.add(member.group, member.size_bytes)
    return plan


def group_of(place: str) -> str | None:
    """Group of a file by its place in the project; None if it does not belong into an archive. Asked on the way out and in."""
    if "\\" in place or not place.isprintable():
        return None  # a separator on another system; a name that no zip can hold
    path = PurePosixPath(place)
    parts, suffix = path.parts, path.suffix.lower()
    if len(parts) == 3 and parts[0] == ".danlu" and not parts[2].startswith("."):
        return _PRIVATE.get(parts[1]) if suffix == ".json" else None
    if len(parts) < 2 or any(part.startswith(".") for part in parts):
        return None
    if parts[0] == "config":
        return "config" if suffix in _CONFIG_SUFFIXES else None
    if parts[0] == "data":
        return "data" if suffix in DATA_SUFFIXES else None
    is_weight = any(part.lower().endswith(_CHECKPOINTS) for part in parts)
    return "runs" if parts[0] == "train" and suffix in _RUN_SUFFIXES and not is_weight else None


def _candidates(project: Project, choice: Choice) -> Iterator[Path]:
    yield from project.config.rglob("*")
    yield from project.train.rglob("*")
    for folder, group in _PRIVATE.items():
        if group != "conversations" or choice.has_conversations:
            yield from (project.private / folder).glob("*.json")
