"""A project is a folder in the guide's layout: data/ model/ config/ train/ huggingface/ final_model/.

Knows where things lie in it and how far it has come. What is inside each folder is known by that folder's own room.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from core.errors import ConflictError, InputError
from core.files import read_json, write_json

_NAME: Final = re.compile(r"[^\W_][\w.-]{0,63}", re.UNICODE)
_MARK: Final = ".danlu"


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
    """Open `root` as a project, making the guide's folders where they lack. Raises InputError if `root` is no folder."""
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise InputError("project.not_a_folder", path=str(root))
    project = Project(root)
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
    mark = project.private / "project.json"
    if not mark.exists():
        write_json(mark, {"schema_version": 1, "created_at": datetime.now(UTC).isoformat()})
    return project


def create_project(home: Path, name: str) -> Project:
    """A new project `home/name`. Raises InputError for a name that is no plain folder name, ConflictError if it exists."""
    if not _NAME.fullmatch(name):
        raise InputError("project.bad_name", name=name)
    root = home.expanduser() / name
    if root.exists():
        raise ConflictError("project.exists", name=name, path=str(root))
    root.mkdir(parents=True)
    return open_project(root)


def list_projects(home: Path) -> list[Project]:
    """Projects below `home` and folders opened from elsewhere, by name."""
    found = {path.parent.resolve(): Project(path.parent) for path in home.glob(f"*/{_MARK}")} if home.is_dir() else {}
    for root in _known(home):
        if (root / _MARK).is_dir():
            found.setdefault(root.resolve(), Project(root))
    return sorted(found.values(), key=lambda project: project.name)


def remember_project(home: Path, root: Path) -> None:
    """Keep a project that lies outside `home` in the list."""
    roots = {str(known) for known in _known(home)} | {str(root.expanduser().absolute())}
    write_json(home / _MARK / "projects.json", sorted(roots))


def _known(home: Path) -> list[Path]:
    index = home / _MARK / "projects.json"
    return [Path(root) for root in read_json(index)] if index.exists() else []
