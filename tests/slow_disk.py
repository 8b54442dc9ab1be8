"""A disk on which every operation is counted, and takes time if it should: what a project on a network share is like.

In this process: `with SlowDisk(root) as disk`. In processes that are started: `environment(root, seconds, folder)`, whose
sitecustomize.py calls `install_from_environment`. Counted is what asks a file server, under `root` only: opening, looking, listing,
renaming, removing, making, flushing (fsync). Reading and writing through an open file is left out: the kernel does it ahead and later.
Stdlib only: it is imported before everything else.
"""

import builtins
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

ROOT_VARIABLE: Final = "TEST_SLOW_DISK_ROOT"
SECONDS_VARIABLE: Final = "TEST_SLOW_DISK_SECONDS"
CALLS_VARIABLE: Final = "TEST_SLOW_DISK_CALLS"
_APP_ROOT: Final = Path(__file__).parents[1]
_OF_PATHS: Final = (
    "open", "stat", "lstat", "statvfs", "listdir", "scandir", "replace", "rename", "unlink", "remove", "mkdir", "rmdir",
)  # fmt: skip
_OF_HANDLES: Final = ("fsync",)


class SlowDisk:
    """While it is entered, operations below `root` are counted and each takes `seconds` longer. `sleep`: what lets them pass."""

    def __init__(self, root: Path, seconds: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._root, self._seconds, self._sleep = os.path.realpath(root), seconds, sleep
        self._before: list[tuple[Any, str, Any]] = []
        self.calls: list[tuple[str, str]] = []
        """(operation, path below the root), oldest first."""
        self._journal: int | None = None
        """An open file that gets every call too."""

    @property
    def count(self) -> int:
        return len(self.calls)

    def __enter__(self) -> Self:
        for name in _OF_PATHS:
            self._wrap(os, name, self._path_of)
        for name in _OF_HANDLES:
            self._wrap(os, name, self._handle_of)
        for module in (io, builtins):
            self._wrap(module, "open", self._path_of)
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, function in self._before:
            setattr(module, name, function)
        self._before.clear()

    def _wrap(self, module: Any, name: str, place_of: Callable[[Any], str | None]) -> None:
        original = getattr(module, name)

        def slow(*arguments: Any, **options: Any) -> Any:
            place = place_of(arguments[0]) if arguments else None
            if place is not None:
                self._note(name, place)
                self._sleep(self._seconds)
            return original(*arguments, **options)

        self._before.append((module, name, original))
        setattr(module, name, slow)

    def _note(self, operation: str, place: str) -> None:
        if self._journal is None:
            self.calls.append((operation, place))
        else:
            line = f"{os.path.basename(sys.argv[0])}\t{operation}\t{place}\n"  # noqa: PTH119 - as below
            os.write(self._journal, line.encode())

    def _path_of(self, path: Any) -> str | None:
        """Below the root, or None: it lies elsewhere, or is a handle that is open already."""
        if isinstance(path, int):
            return None
        text = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - a Path would ask the disk through what is wrapped
        return text[len(self._root) + 1 :] or "." if f"{text}/".startswith(f"{self._root}/") else None

    def _handle_of(self, handle: Any) -> str | None:
        number = handle if isinstance(handle, int) else handle.fileno()
        try:
            return self._path_of(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115 - as above
        except OSError:
            return None


class Clock:
    """Time that passes only when somebody waits: for `now` and `sleep`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def environment(root: Path, seconds: float, folder: Path) -> dict[str, str]:
    """What makes the disk slow for Python processes that are started with it; `folder` gets their sitecustomize.py and their calls."""
    folder.mkdir(parents=True, exist_ok=True)
    code = "from tests.slow_disk import install_from_environment\n\ninstall_from_environment()\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    places = [str(folder), str(_APP_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(places),
        CALLS_VARIABLE: str(folder / "calls"),
        ROOT_VARIABLE: str(root),
        SECONDS_VARIABLE: str(seconds),
    }


def calls_of(program: str, folder: Path) -> list[tuple[str, str]]:
    """What the processes whose script has this name asked for, oldest first."""
    rows = [line.split("\t") for line in (folder / "calls").read_text(encoding="utf-8").splitlines()]
    return [(operation, place) for name, operation, place in rows if name == program]


def install_from_environment() -> None:
    """For the rest of this process."""
    if root := os.environ.get(ROOT_VARIABLE):
        disk = SlowDisk(Path(root), float(os.environ.get(SECONDS_VARIABLE) or 0))
        disk._journal = os.open(os.environ[CALLS_VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        disk.__enter__()
