"""Puts a checkpoint under its name in one step, once all of it is on the disk. Knows files and ranks; not what is in a checkpoint."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from mmengine.dist import barrier, is_main_process

from core.xtuner.runtime.ranks import Alone, RankLost, Ranks

PARTIAL: Final = ".partial"
"""Ends the (hidden) name of what is being written or removed: no reader takes it for a checkpoint."""


def write_together(ranks: Ranks | Alone, partial: Path, target: Path, write: Callable[[], None]) -> None:
    """Let every rank `write` its part to `partial`; rank 0 gives it its name once all of them have, and are heard.

    For one thread of every rank. It ends alike on all: with the whole checkpoint, or with what failed, here or elsewhere, and
    nothing left. Only what a lost rank may be writing still is left where it is, under its hidden name.
    """
    try:
        ranks.together(write)
        ranks.together(lambda: _give_name(partial, target) if ranks.is_first else None)
    except RankLost:
        raise
    except BaseException:
        if ranks.is_first:
            with suppress(OSError):
                remove(partial)
        raise


def write_whole(partial: Path, target: Path, write: Callable[[], None]) -> None:
    """Let every rank `write` to `partial`, then give it its name. What a failed write left is removed."""
    if is_main_process():
        remove(partial)
    barrier()
    try:
        write()
    except BaseException:
        if is_main_process():
            remove(partial)
        raise
    barrier()
    if is_main_process():
        _give_name(partial, target)
    barrier()


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, so that a kill in the middle leaves nothing under its name."""
    if path.is_dir():
        doomed = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.removed{PARTIAL}"))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """What earlier attempts were killed over, while they wrote or removed it."""
    for path in folder.glob(f".*{PARTIAL}"):
        remove(path)


def _give_name(partial: Path, target: Path) -> None:
    _flush(partial)
    if target.is_dir():
        remove(target)
    partial.replace(target)


def _flush(path: Path) -> None:
    """Onto the disk before the rename: after a power cut the name must not stand for an empty file."""
    for file in [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
