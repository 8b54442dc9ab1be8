"""Who started, stopped, deleted, exported, and who came in: one JSON line each in `<home>/.danlu/audit.jsonl`, only ever appended."""

import getpass
import json
import os
import time
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(".danlu") / "audit.jsonl"


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


def system_user() -> str:
    """The account that runs the server; `?` where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "?"
