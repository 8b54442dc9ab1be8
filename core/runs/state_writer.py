"""Writes state.json so that a full disk or a deleted folder cannot end a run. Stdlib only; knows no phases."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_SPARE_BYTES: Final = 4096


def replace_file(path: Path, content: bytes) -> None:
    """Replace `path` by a new file with `content`, atomically. Raises OSError; makes no folder (the run may be deleted)."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


class StateWriter:
    """Keeps a spare file of one block beside the state: on a full disk the state is written into it and renamed."""

    def __init__(self, path: Path, replace: Callable[[Path, bytes], None] = replace_file) -> None:
        self._path = path
        self._spare = path.with_name(f".{path.name}.spare")
        self._replace = replace

    def write(self, state: dict[str, Any]) -> bool:
        """Whether `state` reached the disk. Never raises: the run matters more than the note on it."""
        content = (json.dumps(state, ensure_ascii=False, indent=1) + "\n").encode()
        try:
            self._replace(self._path, content)
        except OSError:
            return self._write_spare(content)
        self._keep_spare()
        return True

    def _write_spare(self, content: bytes) -> bool:
        try:
            with open(self._spare, "r+b") as stream:
                stream.write(content.ljust(_SPARE_BYTES))  # JSON may end in spaces
                stream.flush()
                os.fsync(stream.fileno())
            self._spare.replace(self._path)
        except OSError:
            return False
        self._keep_spare()
        return True

    def _keep_spare(self) -> None:
        if self._spare.exists():
            return
        try:
            self._spare.write_bytes(b" " * _SPARE_BYTES)
        except OSError:
            self._spare.unlink(missing_ok=True)
