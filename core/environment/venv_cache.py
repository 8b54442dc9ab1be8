"""The cache of environments: where each lies, what it is keyed by, who uses it, what may be deleted. Builds nothing.

    ~/.cache/danlu/               ($DANLU_CACHE, or $XDG_CACHE_HOME/danlu)
      env-3.11-0a1b2c3d4e5f/      a virtual environment, keyed by Python version, requirement files and a kept torch
        danlu-environment.json    the finished mark, written last; its mtime is the last use
        danlu-links.json          links that were pointed here
      env-3.11-0a1b2c3d4e5f.lock  held while it is built or deleted

Stdlib only: it runs before anything is installed.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import ConflictError, InputError
from core.files import read_json, write_json

MARK: Final = "danlu-environment.json"
_LINKS: Final = "danlu-links.json"
_PREFIX: Final = "env-"


@dataclass(frozen=True)
class CachedEnvironment:
    """One environment of the cache."""

    path: Path
    is_whole: bool
    """False: its build was cut short, the next build goes on from there."""
    used_at: float
    """Unix seconds of the last `ensure` that gave it out."""
    links: "tuple[Path, ...]"
    """Links that point to it now: while there are any it is in use."""
    is_running_us: bool

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_in_use(self) -> bool:
        return bool(self.links) or self.is_running_us


def cache_folder(environ: "Mapping[str, str] | None" = None) -> Path:
    """`$DANLU_CACHE`, else `$XDG_CACHE_HOME/danlu`, else `~/.cache/danlu`."""
    environ = os.environ if environ is None else environ
    if own := environ.get("DANLU_CACHE"):
        return Path(own).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache").absolute() / "danlu"


def environment_folder(cache: Path, requirements: "Sequence[Path]", kept: str = "") -> Path:
    """Folder for this interpreter's version, the requirement files' contents and the packages kept from outside (`kept`).

    Raises InputError if a requirement file is missing.
    """
    digest = hashlib.sha256()
    for file in requirements:
        if not file.is_file():
            raise InputError("environment.no_requirements", path=str(file))
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    digest.update(f"{sys.platform} {sys.implementation.cache_tag} {kept}".encode())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache / f"{_PREFIX}{version}-{digest.hexdigest()[:12]}"


def is_whole(folder: Path) -> bool:
    """Whether the build of `folder` came to its end and its interpreter is still there."""
    return (folder / MARK).is_file() and (folder / "bin" / "python").exists()


@contextmanager
def locked(folder: Path, *, is_waiting: bool = True) -> "Iterator[bool]":
    """Hold the lock of `folder`. Yields False at once if someone else has it and `is_waiting` is off.

    The kernel frees the lock when its holder dies, so a killed build locks nobody out.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def require_link_place(link: Path, cache: Path) -> None:
    """Raises ConflictError if something other than a link into the cache (or a dead link) lies at `link`."""
    if link.is_symlink():
        target = link.resolve()
        if not target.exists() or target.is_relative_to(cache.resolve()):
            return
        raise ConflictError("environment.foreign_link", path=str(link), target=str(target))
    if link.exists():
        raise ConflictError("environment.real_folder", path=str(link))


def point(link: Path, folder: Path, cache: Path) -> None:
    """Make `link` point to `folder`, atomically, and remember it there. Raises ConflictError as `require_link_place` does."""
    require_link_place(link, cache)
    known = {str(link.absolute()), *(_known_links(folder))}
    write_json(folder / _LINKS, sorted(known))
    if link.is_symlink() and link.resolve() == folder.resolve():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder)
    temporary.replace(link)


def list_environments(cache: Path) -> "list[CachedEnvironment]":
    """What the cache holds, last used first."""
    found = [_read(folder) for folder in cache.glob(f"{_PREFIX}*") if folder.is_dir()]
    return sorted(found, key=lambda environment: -environment.used_at)


def disk_bytes(folder: Path) -> int:
    """Bytes on disk below `folder`; links are not followed, hard-linked files count once."""
    seen = set()
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            stat = os.lstat(os.path.join(root, name))  # noqa: PTH118 - 60,000 files: Path objects double the time
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_blocks * 512
    return total


def delete_environment(cache: Path, name: str) -> None:
    """Delete one environment. Raises InputError if there is none, ConflictError if it is linked, running or being built."""
    found = next((environment for environment in list_environments(cache) if environment.name == name), None)
    if found is None:
        raise InputError("environment.unknown", name=name, path=str(cache))
    with locked(found.path, is_waiting=False) as is_ours:
        if found.is_in_use or not is_ours:
            raise ConflictError(
                "environment.in_use", name=name, links=", ".join(map(str, found.links)) or str(found.path)
            )
        (found.path / MARK).unlink(missing_ok=True)  # First: half deleted must not look whole.
        shutil.rmtree(found.path)
    found.path.with_name(f"{name}.lock").unlink(missing_ok=True)


def _read(folder: Path) -> CachedEnvironment:
    whole = is_whole(folder)
    stamp = folder / MARK if whole else folder
    links = tuple(Path(link) for link in _known_links(folder) if Path(link).resolve() == folder.resolve())
    return CachedEnvironment(
        folder, whole, stamp.stat().st_mtime, links, Path(sys.prefix).resolve() == folder.resolve()
    )


def _known_links(folder: Path) -> "list[str]":
    file = folder / _LINKS
    return [str(link) for link in read_json(file)] if file.is_file() else []
