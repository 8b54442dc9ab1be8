"""Finds base models and brings them into the project: as a verified copy or as a link. Downloads nothing."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError, InputError, MachineError
from core.files import require_absent, require_space
from core.messages import message
from core.models.inspect import ModelCard, inspect_model
from core.project import Project
from core.runs.job import Progress
from core.settings import Settings

_BLOCK_BYTES: Final = 8 * 2**20
_SKIPPED: Final = frozenset({".git", ".cache", "__pycache__", ".locks"})
_DEPTH: Final = 3
"""How deep a shared folder is searched: InternStudio's is `new_models/<owner>/<model>`."""


def find_models(project: Project, settings: Settings, environ: Mapping[str, str] = os.environ) -> list[ModelCard]:
    """Cards of the project's models, then the shared folder's, then the hub caches'. A folder that cannot be read is left out."""
    return [*project_cards(project), *machine_cards(settings, environ)]


def project_cards(project: Project) -> list[ModelCard]:
    """Cards of the models in the project."""
    return [card for folder in project_models(project) if (card := _card(folder, "project"))]


def machine_cards(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[ModelCard]:
    """Cards of the models in the shared folder and in the caches of Hugging Face and ModelScope. Slow on network disks."""
    shared = settings.shared_models
    cards = [card for folder in (_model_folders(shared, _DEPTH) if shared else []) if (card := _card(folder, "shared"))]
    for name, folder in [*_hugging_face_snapshots(environ), *_modelscope_folders(environ)]:
        card = _card(folder, "cache")
        cards += [replace(card, name=name)] if card else []
    return cards


def project_models(project: Project) -> list[Path]:
    """Model folders of the project: `model/` itself as in the guide, else its sub-folders by name."""
    if (project.model / "config.json").is_file():
        return [project.model]
    if not project.model.is_dir():
        return []
    return sorted(
        path for path in project.model.iterdir() if not path.name.startswith(".") and (path / "config.json").is_file()
    )


def free_name(project: Project, name: str) -> Path:
    """Where a model of this name goes in the project. Raises InputError for a name that is no folder name or a guide-style `model/`."""
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError("models.bad_name", name=name)
    if (project.model / "config.json").is_file():
        raise InputError("models.single_model", path=str(project.model))
    return project.model / name


def copy_model(source: str, target: str, progress: Progress) -> dict[str, Any]:
    """Copy the model folder `source` to the new folder `target`, with links replaced by the files they lead to.

    Written under a hidden name, each file read back and compared by SHA-256, and renamed at the end: what is cut short never
    looks whole. Raises InputError if the source is no whole model, ConflictError if the target exists, MachineError if the
    disk is too small or the copy differs.
    """
    origin, goal = Path(source).expanduser(), Path(target)
    require_whole(origin)
    require_absent(goal)
    files = list(_files(origin))
    total = sum(size for _, size in files)
    require_space(goal.parent, total + 64 * 2**20)
    temporary = goal.with_name(f".{goal.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        digests = _copy_all(origin, temporary, files, 2 * total, progress)
        require_absent(goal)
        if goal.is_dir():
            goal.rmdir()
        temporary.replace(goal)
    except OSError as error:
        raise MachineError("models.copy_failed", path=str(goal), reason=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"path": str(goal), "bytes": total, "files": len(files), "sha256": digests}


def link_model(source: Path, target: Path) -> Path:
    """Make `target` a link to the model folder `source`: instant, no space. Raises as `copy_model` does."""
    origin = source.expanduser().resolve()
    require_whole(origin)
    if target.is_symlink():
        if target.resolve() == origin:
            return target
        if not target.exists():
            target.unlink()
    require_absent(target)
    if target.is_dir():
        target.rmdir()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(origin, target_is_directory=True)
    return target


def require_whole(folder: Path) -> ModelCard:
    """The card of `folder`. Raises InputError `models.incomplete` with the first problem if weights or tokenizer are missing."""
    card = inspect_model(folder)
    blocking = [problem for problem in card.problems if problem.key.rsplit(".", 1)[-1] not in ("no_bos", "quantized")]
    if blocking:
        raise InputError("models.incomplete", path=str(folder), problem=blocking[0])
    return card


def _copy_all(
    origin: Path, temporary: Path, files: list[tuple[Path, int]], total: int, progress: Progress
) -> dict[str, str]:
    digests: dict[str, str] = {}
    done = 0
    for path, size in files:
        name = path.as_posix()
        goal = temporary / path
        goal.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(origin / path, "rb") as reader, open(goal, "wb") as writer:
            while block := reader.read(_BLOCK_BYTES):
                writer.write(block)
                digest.update(block)
                done += len(block)
                progress.update(done, total, message("models.progress.copying", file=name), unit="bytes")
            writer.flush()
            os.fsync(writer.fileno())
        digests[name] = digest.hexdigest()
        if goal.stat().st_size != size:
            raise MachineError("models.changed_while_copying", path=str(origin / path))
    for path, _ in files:
        digest = hashlib.sha256()
        with open(temporary / path, "rb") as reader:
            while block := reader.read(_BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                progress.update(done, total, message("models.progress.verifying", file=path.as_posix()), unit="bytes")
        if digest.hexdigest() != digests[path.as_posix()]:
            raise MachineError("models.copy_differs", path=str(temporary / path))
    return digests


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Files of a model folder, relative, with their size. Git's own and download caches are left out."""
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file():
                yield path.relative_to(folder), path.stat().st_size


def _card(folder: Path, source: str) -> ModelCard | None:
    try:
        return inspect_model(folder, source)
    except (DanluError, OSError):
        return None


def _model_folders(folder: Path, depth: int) -> list[Path]:
    try:
        if (folder / "config.json").is_file():
            return [folder]
        below = (
            sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
            if depth
            else []
        )
    except OSError:
        return []
    return [found for path in below for found in _model_folders(path, depth - 1)]


def _hugging_face_snapshots(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    """Name and newest snapshot of each model in the Hugging Face cache."""
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    hub = Path(environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    found = []
    for repository in sorted(hub.glob("models--*")) if hub.is_dir() else []:
        snapshots = [path for path in (repository / "snapshots").glob("*") if (path / "config.json").is_file()]
        if snapshots:
            found.append((repository.name.split("--")[-1], max(snapshots, key=lambda path: path.stat().st_mtime)))
    return found


def _modelscope_folders(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    """Name and folder of each model in ModelScope's cache, in its old layout (`hub/`) and its new one (`hub/models/`).

    Its folders spell a dot as three underscores and may stand beside a link with the true name.
    """
    cache = Path(environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
    files = [
        file for depth in ("hub/*/*", "hub/models/*/*", "models/*/*") for file in cache.glob(f"{depth}/config.json")
    ]
    folders = {file.parent.resolve(): file.parent.name for file in files}
    return sorted((name.replace("___", "."), folder) for folder, name in folders.items())
