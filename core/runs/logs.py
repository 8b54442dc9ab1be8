"""Reads train.log by bytes: the tail, a search, the lines of a level. Knows no causes: `core.runs.failure` does."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from core.runs.directory import RunDirectory

TAIL_BYTES: Final = 256 * 2**10
_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_WARNING: Final = re.compile(r"\bwarn(?:ing)?\b|Warning\b", re.IGNORECASE)
_ERROR: Final = re.compile(r"\b(?:error|critical|fatal|traceback|exception)\b|\w+(?:Error|Exception)\b", re.IGNORECASE)


class Level(StrEnum):
    """How loud a line is, the least first."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LogTail:
    """The end of a log."""

    lines: list[str]
    is_cut: bool
    """Whether there is more before the first line."""


def log_file(run: RunDirectory) -> Path:
    """The log of `run`; for a work dir made by hand, XTuner's own of the latest start."""
    if run.log_file.exists():
        return run.log_file
    return max(run.path.glob("*/*.log"), key=lambda file: file.name, default=run.log_file)


def read_tail(path: Path, max_bytes: int = TAIL_BYTES, first_byte: int = 0) -> LogTail:
    """The whole lines in the last `max_bytes` after `first_byte`, without colour codes. A missing file is empty."""
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(first_byte, size - max_bytes))
            raw = stream.read(max_bytes)
    except OSError:
        return LogTail([], is_cut=False)
    is_cut = size - first_byte > max_bytes
    lines = clean(raw.decode("utf-8", "replace"))
    return LogTail(lines[1:] if is_cut and len(lines) > 1 else lines, is_cut)


def read_head(path: Path, max_bytes: int = TAIL_BYTES) -> list[str]:
    """The lines in the first `max_bytes`, without colour codes."""
    try:
        with open(path, "rb") as stream:
            return clean(stream.read(max_bytes).decode("utf-8", "replace"))
    except OSError:
        return []


def clean(text: str) -> list[str]:
    """Lines as a terminal would leave them: no colour codes, and of a line overwritten by \\r only its last state."""
    plain = _ESCAPES.sub("", text).replace("\r\n", "\n")
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in plain.split("\n") if line.strip()]


def select(lines: list[str], query: str = "", level: Level = Level.INFO) -> list[str]:
    """Lines that hold `query` (case does not matter) and are at least as loud as `level`.

    A traceback is as loud as the line it begins with, to its last line.
    """
    needle = query.casefold()
    chosen = [line for line, loud in zip(lines, _levels(lines), strict=True) if _rank(loud) >= _rank(level)]
    return [line for line in chosen if needle in line.casefold()] if needle else chosen


def level_of(line: str) -> Level:
    if _ERROR.search(line):
        return Level.ERROR
    return Level.WARNING if _WARNING.search(line) else Level.INFO


def _levels(lines: list[str]) -> list[Level]:
    levels: list[Level] = []
    is_in_traceback = False
    for line in lines:
        own = level_of(line)
        if "Traceback (most recent call last)" in line:
            is_in_traceback = True
        elif is_in_traceback and not line.startswith((" ", "\t", "[rank")):
            is_in_traceback = False  # its last line, `SomeError: …`, is loud by itself
        levels.append(Level.ERROR if is_in_traceback else own)
    return levels


def _rank(level: Level) -> int:
    return list(Level).index(level)
