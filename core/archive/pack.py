"""Writes a project into one zip without weights and without secrets, as a job. A list of hashes lies in it."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from core.archive.contents import MANIFEST, SCHEMA_VERSION, Choice, Member, members
from core.archive.masking import masker
from core.errors import MachineError
from core.files import free_path, require_space
from core.messages import message
from core.project import Project, open_project, read_mark
from core.runs.bundle import app_commit
from core.runs.directory import RunDirectory
from core.runs.job import Progress
from core.runs.launch import now_utc, start_job

KIND: Final = "pack"
_CHUNK_BYTES: Final = 2**20


def exports_folder(project: Project) -> Path:
    """Where archives of `project` are written to."""
    return project.private / "exports"


def start_export(project: Project, choice: Choice) -> RunDirectory:
    """Start `export_project` as a job; its result says where the archive is."""
    arguments = {"project": str(project.root), "data": list(choice.data), "has_conversations": choice.has_conversations}
    return start_job(project, "core.archive.pack:export_project", kind=KIND, title=project.name, arguments=arguments)


def export_project(project: str, data: list[str], *, has_conversations: bool, progress: Progress) -> dict[str, Any]:
    """Write `<name>_<time>.danlu.zip`. Raises MachineError on a full disk; what was half written is removed.

    Every text but the data sets goes through `core.archive.masking`; the hashes are of what the archive holds.
    """
    opened = open_project(Path(project))
    found = members(opened, Choice(tuple(data), has_conversations))
    folder = exports_folder(opened)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, sum(member.size_bytes for member in found) // 4)
    target = free_path(folder / f"{opened.name}_{datetime.now().astimezone():%Y%m%d_%H%M%S}.danlu.zip")
    part = target.with_name(f".{target.name}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            files = _write_members(archive, found, progress)
            archive.writestr(MANIFEST, json.dumps(_manifest(opened, files), ensure_ascii=False, indent=1))
        part.rename(target)
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(target), reason=error.strerror or str(error)) from error
    finally:
        part.unlink(missing_ok=True)
    return {"path": str(target), "files": len(files), "size_bytes": target.stat().st_size}


def _write_members(archive: zipfile.ZipFile, found: list[Member], progress: Progress) -> list[dict[str, Any]]:
    total, done, files = sum(member.size_bytes for member in found), 0, []
    mask = masker()
    for member in found:
        digest, size_bytes = hashlib.sha256(), 0
        with archive.open(member.place, "w", force_zip64=True) as out:
            for chunk in _chunks(member, mask):
                out.write(chunk)
                digest.update(chunk)
                size_bytes += len(chunk)
                progress.update(
                    min(done + size_bytes, total), total + 1, message("archive.progress.packing"), unit="bytes"
                )
        done += member.size_bytes
        at = round(member.path.stat().st_mtime, 3)
        files.append({"path": member.place, "bytes": size_bytes, "sha256": digest.hexdigest(), "modified_at": at})
    return files


def _chunks(member: Member, mask: Callable[[bytes], bytes]) -> Iterator[bytes]:
    with open(member.path, "rb") as stream:
        if member.group in ("data", "conversations"):  # these stay as they are, byte for byte
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        else:
            while lines := stream.readlines(_CHUNK_BYTES):
                yield mask(b"".join(lines))


def _manifest(project: Project, files: list[dict[str, Any]]) -> dict[str, Any]:
    mark = read_mark(project)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": project.name,
        "id": mark.get("id"),
        "project_created_at": mark.get("created_at"),
        "created_at": now_utc(),
        "app_commit": app_commit(),
        "files": files,
    }
