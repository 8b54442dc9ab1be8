"""The key of a server on loopback: made anew for each, in a file that only its owner reads. A web page cannot know it."""

import os
import secrets
from pathlib import Path
from typing import Final

KEY_FILE: Final = "api_key"


def write_key(file: Path) -> str:
    """Make a key and write it to `file`, mode 0600."""
    key = "danlu-" + secrets.token_urlsafe(24)
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
        stream.write(key)
    return key
