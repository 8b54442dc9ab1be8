"""Makes a new project of an archive, as a job. An archive may come from anybody: nothing of it is believed before it is checked.

It goes into a folder of its own that gets its name when every file has come out whole, and never over something that is there.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

from core.archive.contents import MANIFEST, SCHEMA_VERSION, Plan, group_of
from core.errors import DanluError, InputError, MachineError
from core.files import free_path, read_json, require_space, write_json
from core.messages import message
from core.project import Project, new_root, open_project
from core.runs.directory import RunDirectory
from core.runs.job import Progress
from core.runs.launch import now_utc, start_job
from core.runs.state import Phase
from core.schema import upgraded

KIND: Final = "unpack"
MOST_FILES: Final = 100_000
MOST_BYTES: Final = 64 * 2**30
"""Of all files together, unpacked."""
_MANIFEST_BYTES: Final = 64 * 2**20
_CHUNK_BYTES: Final = 2**20
_MARK: Final = Path(".danlu") / "imported.json"


@dataclass(frozen=True, slots=True)
class ArchiveCard:
    """What an archive says of itself and what it holds, checked but not unpacked."""

    path: Path
    name: str
    id: str | None
    created_at: str
    files: dict[str, "ListedFile"]
    """By place in the project."""
    plan: Plan


@dataclass(frozen=True, slots=True)
class ListedFile:
    """What the list of hashes says of one file."""

    size_bytes: int
    sha256: str
    modified_at: float
    """Unix seconds: runs are listed by it. 0 if it is not told."""


def inspect_archive(path: Path) -> ArchiveCard:
    """Look at every name and size. Raises InputError `archive.not_one`, `.unsafe`, `.too_large`; `files.newer_schema` of a newer app."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise InputError("archive.too_large", path=path.name, files=MOST_FILES, gib=MOST_BYTES // 2**30)
            manifest = _read_manifest(archive, path)
    except (OSError, zipfile.BadZipFile, NotImplementedError, KeyError, ValueError, TypeError, zlib.error) as error:
        raise InputError("archive.not_one", path=path.name, reason=str(error) or type(error).__name__) from error
    files = _files_of(manifest, path)
    plan = Plan()
    for entry in entries:
        if entry.filename != MANIFEST:
            plan.add(_checked_group(entry, files), entry.file_size)
    if plan.files != len(files):
        raise InputError("archive.not_one", path=path.name, reason=f"{plan.files} / {len(files)}")
    name, created_at = str(manifest.get("name") or "project"), str(manifest.get("created_at") or "")
    return ArchiveCard(path, name, manifest.get("id"), created_at, files, plan)


def start_import(project: Project, archive: Path, home: Path, name: str) -> RunDirectory:
    """Start `import_project` as a job of `project`, the one in use. Raises InputError or ConflictError for a name that cannot be."""
    new_root(home, name)
    arguments = {"archive": str(archive), "home": str(home), "name": name}
    return start_job(project, "core.archive.unpack:import_project", kind=KIND, title=name, arguments=arguments)


def import_project(archive: str, home: str, name: str, progress: Progress) -> dict[str, Any]:
    """Unpack into the new project `home/name`. Raises InputError `archive.damaged` if a file is not what the list of hashes says."""
    card = inspect_archive(Path(archive))
    root = new_root(Path(home), name)
    staging_home = Path(home) / ".danlu" / "importing"
    staging_home.mkdir(parents=True, exist_ok=True)
    require_space(staging_home, card.plan.size_bytes)
    staging = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=staging_home))
    try:
        _unpack(card, staging, progress)
        _settle_runs(staging / "train", card)
        write_json(staging / _MARK, {"schema_version": 1, "id": card.id, "name": card.name, "at": now_utc()})
        staging.chmod(0o755)
        new_root(Path(home), name)
        staging.rename(root)
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(root), reason=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    open_project(root)
    return {"path": str(root), "files": card.plan.files}


def keep_upload(project: Project, name: str, stream: BinaryIO) -> Path:
    """Write an archive that came through the browser into the project's private folder. Raises MachineError on a full disk."""
    folder = project.private / "imports"
    folder.mkdir(parents=True, exist_ok=True)
    plain = PurePosixPath(name.replace("\\", "/")).name.lstrip(".")
    target = free_path(folder / (plain or "archive.zip"))
    try:
        with open(target, "xb") as out:
            shutil.copyfileobj(stream, out, _CHUNK_BYTES)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise MachineError("files.cannot_write", path=str(target), reason=error.strerror or str(error)) from error
    return target


def _read_manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    entry = archive.getinfo(MANIFEST)
    if entry.file_size > _MANIFEST_BYTES:
        raise InputError("archive.too_large", path=path.name, files=MOST_FILES, gib=MOST_BYTES // 2**30)
    with archive.open(entry) as stream:
        value = json.loads(stream.read(_MANIFEST_BYTES))
    return upgraded(value, path, SCHEMA_VERSION, {})


def _files_of(manifest: dict[str, Any], path: Path) -> dict[str, ListedFile]:
    now = time.time()
    try:
        return {
            str(file["path"]): ListedFile(
                int(file["bytes"]), str(file["sha256"]), min(max(0.0, float(file.get("modified_at") or 0.0)), now)
            )
            for file in manifest["files"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("archive.not_one", path=path.name, reason=f"{type(error).__name__}: {error}") from error


def _checked_group(entry: zipfile.ZipInfo, files: dict[str, ListedFile]) -> str:
    """Group of an entry that is a plain file at a place where a project has one; else InputError `archive.unsafe`."""
    place = entry.filename
    path, mode = PurePosixPath(place), entry.external_attr >> 16
    is_plain = not entry.is_dir() and (not stat.S_IFMT(mode) or stat.S_ISREG(mode)) and not entry.flag_bits & 0x1
    has_plain_name = str(path) == place
    is_inside = (
        not path.is_absolute() and ".." not in path.parts and all(len(part.encode()) < 256 for part in path.parts)
    )
    group = group_of(place) if is_plain and has_plain_name and is_inside else None
    if group is None or place not in files or files[place].size_bytes != entry.file_size:
        raise InputError("archive.unsafe", entry=place[:200])
    return group


def _unpack(card: ArchiveCard, staging: Path, progress: Progress) -> None:
    done = 0
    with zipfile.ZipFile(card.path) as archive:
        for place, listed in card.files.items():
            target = staging / place
            target.parent.mkdir(parents=True, exist_ok=True)
            digest, written = hashlib.sha256(), 0
            try:
                with archive.open(place) as stream, open(target, "xb") as out:  # "x": two entries of one name
                    while written <= listed.size_bytes and (chunk := stream.read(_CHUNK_BYTES)):
                        out.write(chunk)
                        digest.update(chunk)
                        written += len(chunk)
                        total = card.plan.size_bytes + 1
                        progress.update(done + written, total, message("archive.progress.unpacking"), unit="bytes")
            except (zipfile.BadZipFile, zlib.error, EOFError, FileExistsError, KeyError) as error:
                raise InputError("archive.damaged", entry=place[:200]) from error
            if written != listed.size_bytes or digest.hexdigest() != listed.sha256:
                raise InputError("archive.damaged", entry=place[:200])
            os.utime(target, (listed.modified_at, listed.modified_at))
            done += written


def _settle_runs(train: Path, card: ArchiveCard) -> None:
    """Runs that came with an archive are to look at: their command is somebody else's, their processes another machine's."""
    for file in train.glob("*/run.json"):
        run = RunDirectory(file.parent)
        write_json(run.imported_file, {"schema_version": 1, "project": card.name, "id": card.id, "at": now_utc()})
        try:
            state = read_json(run.state_file)
            phase = Phase(state["phase"])
        except (DanluError, KeyError, TypeError, ValueError):
            run.state_file.unlink(missing_ok=True)
            continue
        settled = {**state, "process": None, "phase": Phase.LOST if phase.is_active else phase}
        write_json(run.state_file, settled)
