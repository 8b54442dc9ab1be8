"""The hash-pinned lock of every package that tests and lint need: reads it, and says of which requirement files it is.

    # of: 3f1c…                       digest of the requirement lines it was made of
    anyio==4.16.0 ; sys_platform == 'linux' \\
        --hash=sha256:…

Holds whole what `pip install --no-deps` takes: nothing is resolved again. core.environment.lock_renewal writes it. Stdlib only.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import InputError

BUILD_TOOLS: Final = ("setuptools",)
"""What the packages that come as source (deepspeed, transformers-stream-generator) are built with: from the lock as well."""
_OF: Final = "# of: "
_PINNED: Final = re.compile(r"([a-z0-9][a-z0-9._-]*)==(\S+)")
_HASH: Final = re.compile(r"--hash=(sha256:[0-9a-f]{64})(?!\S)")


@dataclass(frozen=True, slots=True)
class LockedPackage:
    """One package at one version, for the machines that `marker` names."""

    name: str
    """As written: lower case, dashes."""
    version: str
    marker: str
    """"" for every machine."""
    hashes: "tuple[str, ...]"
    text: str
    """Its lines of the lock."""


def read_lock(file: Path) -> "list[LockedPackage]":
    """The packages of a lock. Raises InputError for a line that is not pinned and hashed: it would be installed unseen."""
    if not file.is_file():
        raise InputError("environment.no_requirements", path=str(file))
    found = []
    for text in _entries(file.read_text(encoding="utf-8")):
        asked, marker = (part.strip() for part in _asked(text).partition(";")[::2])
        pinned, hashes = _PINNED.fullmatch(asked), tuple(_HASH.findall(text))
        if pinned is None or not hashes:
            raise InputError("dependencies.not_locked", path=str(file), line=text.splitlines()[0])
        found.append(LockedPackage(pinned[1], pinned[2], marker, hashes, text))
    return found


def requirement_lines(files: "Sequence[Path]") -> "list[str]":
    """What the requirement files ask for, without comments, in order, once each; `-r` is followed."""
    found: dict[str, None] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            text = line.split("#")[0].strip()
            if text.startswith("-r"):
                found.update(dict.fromkeys(requirement_lines([file.parent / text[2:].strip()])))
            elif text:
                found[text] = None
    return list(found)


def of_line(files: "Sequence[Path]") -> str:
    """The line of a lock's head that says what it was made of; comments and the order of the requirements do not count."""
    return _OF + hashlib.sha256("\n".join(sorted(requirement_lines(files))).encode()).hexdigest()


def _asked(text: str) -> str:
    """The entry without its hashes: package, version and marker."""
    return text.replace("\\\n", " ").partition(" --hash=")[0]


def _entries(text: str) -> "list[str]":
    """The logical lines: a backslash goes on with the next one."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [entry.rstrip() for entry in re.split(r"(?<!\\)\n", "\n".join(lines)) if entry.strip()]
