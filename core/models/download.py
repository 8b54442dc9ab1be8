"""Downloads a base model into the project as a job that survives cuts and kills. Knows hubs by their listing only.

Everything lies in `model/.<name>.<key>.download/` until the last file is verified; then `files/` is renamed to the model's
name, so a model that is there is whole. What a cut, a cancel or a kill leaves is taken up by the next start.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import ConflictError, DanluError, MachineError
from core.files import read_json, require_absent, require_space, write_json
from core.messages import message
from core.models.hubs import Hub, Listing, open_hub
from core.models.transfer import Link, RemoteFile, fetch, have_bytes, is_right
from core.project import Project
from core.runs.job import Progress

SPARE_BYTES: Final = 256 * 2**20
"""Free space left beside a download."""
_SUFFIX: Final = ".download"
_NOTE: Final = "download.json"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A download that was cut short."""

    path: Path
    target: Path
    hub: str
    endpoint: str
    repo: str
    revision: str
    have_bytes: int
    total_bytes: int

    def arguments(self) -> dict[str, Any]:
        """Arguments of `download_model` that go on with it."""
        return {
            "hub": self.hub,
            "endpoint": self.endpoint,
            "repo": self.repo,
            "revision": self.revision,
            "target": str(self.target),
        }


def download_model(
    *, hub: str, endpoint: str, repo: str, revision: str, target: str, progress: Progress
) -> dict[str, Any]:
    """Job: bring `repo` into the new folder `target`, every file verified. Returns path, revision, bytes and unverified files.

    Raises ConflictError if the target exists or the same download runs, MachineError for too little space, a hub that cannot be
    reached or bytes that are wrong, InputError for a model that is not there or closed.
    """
    goal = Path(target)
    require_absent(goal)
    progress.update(0, None, message("models.progress.looking_up", repo=repo))
    source = open_hub(hub, endpoint)
    listing = source.listing(repo, revision)
    staging = staging_folder(goal, listing)
    with _locked(staging):
        write_json(staging / _NOTE, _note(listing, goal))
        files = staging / "files"
        missing = listing.total_bytes - sum(have_bytes(files / file.path) for file in listing.files)
        require_space(goal.parent, max(0, missing) + SPARE_BYTES)
        _bring_all(source, listing, files, progress)
        require_absent(goal)
        if goal.is_dir():
            goal.rmdir()
        files.replace(goal)
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "path": str(goal),
        "revision": listing.revision,
        "bytes": listing.total_bytes,
        "unverified": [file.path for file in listing.files if file.digest is None],
    }


def staging_folder(target: Path, listing: Listing) -> Path:
    """Where a download of this model to `target` gathers; hidden, and another one for another model."""
    key = hashlib.sha256(f"{listing.hub}\0{listing.repo}\0{listing.revision}".encode()).hexdigest()[:8]
    return target.with_name(f".{target.name}.{key}{_SUFFIX}")


def unfinished_downloads(project: Project) -> list[Unfinished]:
    """Downloads of this project that came to no end (or still run), by name."""
    found = []
    for note in sorted(project.model.glob(f".*{_SUFFIX}/{_NOTE}")):
        try:
            found.append(_unfinished(note))
        except (DanluError, KeyError, TypeError, ValueError):
            continue
    return found


def discard(project: Project, path: Path) -> None:
    """Delete what an unfinished download gathered. Raises ConflictError while it runs."""
    if path not in [item.path for item in unfinished_downloads(project)]:
        return
    with _locked(path):
        shutil.rmtree(path)


def _bring_all(source: Hub, listing: Listing, folder: Path, progress: Progress) -> None:
    done, total = 0, listing.total_bytes
    for remote in listing.files:

        def say(key: str, position: int, before: int = done, name: str = remote.path) -> None:
            progress.update(before + position, total, message(f"models.progress.{key}", file=name), unit="bytes")

        _bring(remote, source.link(listing, remote), folder / remote.path, say)
        done += remote.size_bytes
    extra = {path for path in folder.rglob("*") if path.is_file()} - {folder / file.path for file in listing.files}
    for path in extra:  # The model changed on the hub between two attempts.
        path.unlink()


def _bring(remote: RemoteFile, link: Link, target: Path, say: Callable[[str, int], None]) -> None:
    if target.exists():
        say("verifying", remote.size_bytes)
        if is_right(target, remote):
            return
        target.unlink()
    say("downloading", have_bytes(target))
    fetch(
        remote,
        link,
        target,
        on_bytes=lambda position: say("downloading", min(position, remote.size_bytes)),
        on_verify=lambda: say("verifying", remote.size_bytes),
    )


def _note(listing: Listing, target: Path) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "hub": listing.hub,
        "endpoint": listing.endpoint,
        "repo": listing.repo,
        "revision": listing.revision,
        "target": target.name,
        "total_bytes": listing.total_bytes,
    }


def _unfinished(note: Path) -> Unfinished:
    value = read_json(note)
    staging = note.parent
    have = sum(_size_bytes(file) for file in (staging / "files").rglob("*"))
    return Unfinished(
        staging,
        staging.with_name(str(value["target"])),
        str(value["hub"]),
        str(value["endpoint"]),
        str(value["repo"]),
        str(value["revision"]),
        have,
        int(value["total_bytes"]),
    )


def _size_bytes(path: Path) -> int:
    """Size of a file; 0 for a folder, or for a file that a running download has just renamed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


@contextmanager
def _locked(staging: Path) -> Iterator[None]:
    """Hold `staging` for this process; the kernel lets go when it dies. Raises ConflictError if another one holds it."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = open(staging / "lock", "w", encoding="ascii")  # noqa: SIM115 - closed below, with the lock
    except OSError as error:
        raise MachineError("models.cannot_store", path=str(staging), reason=error.strerror or str(error)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError("models.download_running", path=str(staging)) from error
        yield
