"""Reads the sample answers that a run wrote beside its metrics, and JSON-lines files such as theirs. Knows no charts."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.runs.directory import RunDirectory


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """What the model answered to a fixed prompt at one iteration."""

    iteration: int
    prompt: str
    system: str
    answer: str


class LineReader:
    """Follows a JSON-lines file: each `refresh()` reads what was added, whole lines only. Several threads may call it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._offset = self._inode = 0
        self._values: list[dict[str, Any]] = []

    def refresh(self) -> list[dict[str, Any]]:
        """All objects so far; a new list each time. A file that was replaced or cut is read anew."""
        with self._lock:
            try:
                with open(self._path, "rb") as stream:
                    status = self._path.stat()
                    if status.st_size < self._offset or self._inode not in (0, status.st_ino):
                        self._offset, self._values = 0, []
                    self._inode = status.st_ino
                    stream.seek(self._offset)
                    block = stream.read()
            except OSError:
                return list(self._values)
            end = block.rfind(b"\n") + 1
            self._offset += end
            self._values += [value for line in block[:end].splitlines() if (value := _object(line)) is not None]
            return list(self._values)


def read_answers(run: RunDirectory) -> list[SampleAnswer]:
    """Sample answers in their order; of an iteration that a resume repeated, the newest."""
    rows: dict[tuple[int, str], SampleAnswer] = {}
    for value in LineReader(run.samples_file).refresh():
        try:
            answer = SampleAnswer(
                int(value["iteration"]), str(value["prompt"]), str(value.get("system") or ""), str(value["answer"])
            )
        except (KeyError, TypeError, ValueError):
            continue
        rows[answer.iteration, answer.prompt] = answer
    return sorted(rows.values(), key=lambda answer: answer.iteration)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("at", 0), int | float) else None
