"""The environment that quantises: llm-compressor at exact versions, beside the torch that is here.

Built by core.environment.venv in its cache, listed and deleted there like any other. The versions are those of two requirement files.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.environment import venv_cache
from core.environment.doctor import build_environment
from core.environment.known_good import APP_ROOT, known_good
from core.environment.venv import kept_packages
from core.errors import ConflictError, InputError
from core.runs.job import Progress

REQUIREMENTS: Final = APP_ROOT / "requirements-quantize.txt"
NODEPS: Final = APP_ROOT / "requirements-quantize-nodeps.txt"
PACKAGE: Final = "llmcompressor"
_OWN_BYTES: Final = 200 * 10**6
_TORCH_BYTES: Final = 6 * 10**9
"""torch with the CUDA libraries it brings."""
_PARENT_FILE: Final = "_danlu_parent.pth"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where it lies, or will."""

    folder: Path
    is_ready: bool
    disk_bytes: int
    """What it takes now, or about what it will."""

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


def find_environment(cache: Path | None = None) -> Environment:
    """The one for the versions pinned now and this machine's torch."""
    kept = kept_packages([REQUIREMENTS])
    said = " ".join(sorted(f"{name}=={version}" for name, version in kept.items()))
    folder = venv_cache.environment_folder(cache or venv_cache.cache_folder(), [REQUIREMENTS, NODEPS], said)
    if _is_ready(folder):
        return Environment(folder, True, venv_cache.disk_bytes(folder))
    return Environment(folder, False, _OWN_BYTES + (0 if kept else _TORCH_BYTES))


def pinned_version(name: str = PACKAGE) -> str:
    """Of one of its packages, as it is pinned."""
    return known_good(REQUIREMENTS, NODEPS)[name].specifier.removeprefix("==")


def prepare(progress: Progress, *, may_install: bool) -> Environment:
    """The environment, built if it is not there: a build that was cut short goes on where it stopped.

    Raises InputError `quantize.not_installed` if nobody agreed to a build, and what `build_environment` raises.
    """
    found = find_environment()
    if not found.is_ready:
        if not may_install:
            raise InputError("quantize.not_installed", package=PACKAGE, version=pinned_version())
        (found.folder / venv_cache.MARK).unlink(missing_ok=True)  # There may be one whose torch is gone.
        build_environment(sys.executable, REQUIREMENTS, NODEPS, progress)
    return find_environment()


@contextmanager
def in_use(environment: Environment) -> Iterator[None]:
    """Keep it from being deleted meanwhile. Raises ConflictError `quantize.environment_busy` if someone else builds or uses it."""
    with venv_cache.locked(environment.folder, is_waiting=False) as is_ours:
        if not is_ours:
            raise ConflictError("quantize.environment_busy", path=str(environment.folder))
        yield


def delete() -> None:
    """Raises what `venv_cache.delete_environment` raises."""
    folder = find_environment().folder
    venv_cache.delete_environment(folder.parent, folder.name)


def _is_ready(folder: Path) -> bool:
    """Whether it is whole, and so is the torch that it borrows: that lies in another environment, which may have been deleted."""
    parents = folder.glob(f"lib/python*/site-packages/{_PARENT_FILE}")
    borrowed = [Path(file.read_text(encoding="utf-8").strip()) for file in parents]
    return venv_cache.is_whole(folder) and all((place / "torch").is_dir() for place in borrowed)
