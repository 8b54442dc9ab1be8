"""A project is a folder in the guide's layout: data/ model/ config/ train/ huggingface/ final_model/.

Knows where things lie in it and how far it has come. What is inside each folder is known by that folder's own room.
"""

import re
import shutil
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from core.errors import ConflictError, InputError, MachineError
from core.files import write_json
from core.schema import Step, read_upgraded

_NAME: Final = re.compile(r"[^\W_][\w.-]{0,63}", re.UNICODE)
_MARK: Final = ".danlu"
SCHEMA_VERSION: Final = 2
"""Of project.json and of what lies beside it."""
_LIST_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Project:
    """The folders of one project. The guide's `/root/ft` opens as one too."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def data(self) -> Path:
        """Data sets: `*.json`, `*.jsonl`."""
        return self.root / "data"

    @property
    def model(self) -> Path:
        """Base models: one in `model/` itself, as in the guide, or one a sub-folder."""
        return self.root / "model"

    @property
    def config(self) -> Path:
        """XTuner configs: `*.py`."""
        return self.root / "config"

    @property
    def train(self) -> Path:
        """Runs: one run directory each."""
        return self.root / "train"

    @property
    def huggingface(self) -> Path:
        """Adapters in PEFT format, one folder each."""
        return self.root / "huggingface"

    @property
    def final_model(self) -> Path:
        """Merged models, one folder each."""
        return self.root / "final_model"

    @property
    def private(self) -> Path:
        """The app's own: `jobs/` (copies, merges, …), `chat/`, `trash/`, `drafts/`, `project.json`."""
        return self.root / _MARK

    @property
    def jobs(self) -> Path:
        """Run directories of everything that is not training."""
        return self.private / "jobs"

    @property
    def chat(self) -> Path:
        """Chat workers and saved conversations."""
        return self.private / "chat"

    @property
    def drafts(self) -> Path:
        """Half-filled forms."""
        return self.private / "drafts"


def open_project(root: Path) -> Project:
    """Open `root` as a project, making the guide's folders where they lack.

    Raises InputError if `root` is no folder or of a newer app, MachineError if the folders cannot be made.
    """
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise InputError("project.not_a_folder", path=str(root))
    project = Project(root)
    read_mark(project)
    try:
        for folder in (
            project.data,
            project.model,
            project.config,
            project.train,
            project.huggingface,
            project.final_model,
            project.jobs,
        ):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(root), reason=error.strerror or str(error)) from error
    mark = project.private / "project.json"
    if not mark.exists():
        write_json(mark, _new_mark({"created_at": datetime.now(UTC).isoformat()}) | {"schema_version": SCHEMA_VERSION})
    read_mark(project)
    return project


def read_mark(project: Project) -> dict[str, Any]:
    """What project.json says: when it was made, and an id that stays the project's when its folder is moved or renamed.

    Its version stands for all files of `.danlu` that carry none of their own. A project of an older app is brought forward here, the
    old file kept; raises InputError `files.newer_schema` for one of a newer app, which nothing may then write to.
    """
    mark = project.private / "project.json"
    return read_upgraded(mark, SCHEMA_VERSION, _STEPS) if mark.exists() else {}


def create_project(home: Path, name: str) -> Project:
    """A new project `home/name`. Raises InputError for a name that is no plain folder name, ConflictError if it exists, MachineError."""
    root = new_root(home, name)
    try:
        root.mkdir(parents=True)
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(root), reason=error.strerror or str(error)) from error
    try:
        return open_project(root)
    except MachineError:
        shutil.rmtree(root, ignore_errors=True)  # else the name would be taken by half a project
        raise


def new_root(home: Path, name: str) -> Path:
    """Where a new project of this name will lie. Raises InputError for no plain folder name, ConflictError if it exists."""
    if not _NAME.fullmatch(name):
        raise InputError("project.bad_name", name=name)
    root = home.expanduser() / name
    if root.exists():
        raise ConflictError("project.exists", name=name, path=str(root))
    return root


def list_projects(home: Path) -> list[Project]:
    """Projects below `home` and folders opened from elsewhere, by name; a list of the latter that cannot be read holds none."""
    found = {path.parent.resolve(): Project(path.parent) for path in home.glob(f"*/{_MARK}")} if home.is_dir() else {}
    try:
        elsewhere = _known(home)
    except InputError:
        elsewhere = []
    for root in elsewhere:
        if (root / _MARK).is_dir():
            found.setdefault(root.resolve(), Project(root))
    return sorted(found.values(), key=lambda project: project.name)


def remember_project(home: Path, root: Path) -> None:
    """Keep a project that lies outside `home` in the list. Raises InputError if the list is broken: it is not written over."""
    roots = {str(known) for known in _known(home)} | {str(root.expanduser().absolute())}
    write_json(home / _MARK / "projects.json", {"schema_version": _LIST_VERSION, "roots": sorted(roots)})


def _known(home: Path) -> list[Path]:
    index = home / _MARK / "projects.json"
    if not index.exists():
        return []
    value = read_upgraded(index, _LIST_VERSION, {0: lambda roots: {"roots": [str(root) for root in roots]}})
    roots = value.get("roots")
    if not isinstance(roots, list):
        raise InputError("files.broken_schema", path=str(index), reason="roots")
    return [Path(str(root)) for root in roots]


def _new_mark(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "id": uuid.uuid4().hex}


_STEPS: Final[dict[int, Step]] = {0: dict, 1: _new_mark}
"""Version 1 had no id; version 0 no version."""
