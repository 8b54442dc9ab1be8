"""Who started, stopped, deleted, exported, and who came in: one JSON line each in `<home>/.danlu/audit.jsonl`, only ever appended.

Knows no request: who it was is told by those who ask for the record.
"""

import getpass
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(".danlu") / "audit.jsonl"
ACTIONS: Final = (
    "login", "login_failed", "create", "open", "start", "stop", "cancel", "resume", "delete", "restore", "export", "import",
    "upload", "allow",
)  # fmt: skip
"""What is recorded. `allow`: a person let a model's own code run."""
_TAIL_BYTES: Final = 2 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log."""

    at: float
    """Unix seconds."""
    action: str
    who: str
    """An e-mail address, a login of the password gate, or the account of the server; empty where none is known."""
    project: str
    target: str
    """What it was done to: a run, a file, a model."""
    address: str
    """Where it came from on the network; empty on loopback."""


def record(home: Path, action: str, **details: Any) -> None:
    """Append what was done. An audit log that cannot be written stops nobody from stopping a run, so failure is not an error here."""
    line = json.dumps({"at": round(time.time(), 3), "action": action, **details}, ensure_ascii=False, default=str)
    try:
        file = home / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError:
        return


def read(home: Path) -> list[Entry]:
    """What the end of the log says (2 MiB, some ten thousand lines), the latest first; lines that are none are passed over."""
    try:
        with open(home / FILE, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [entry for line in reversed(lines) if (entry := _entry(line)) is not None]


def system_user() -> str:
    """The account that runs the server; `?` where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "?"


def _entry(line: str) -> Entry | None:
    try:
        value = json.loads(line)
        named = {name: str(value.get(name) or "") for name in ("who", "project", "target", "address")}
        return Entry(float(value["at"]), str(value["action"]), **named)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
