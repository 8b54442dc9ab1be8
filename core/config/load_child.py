"""Reads one config with mmengine and writes its plain values: `python -m core.config.load_child CONFIG ANSWER`.

Runs in its own process with a time limit (see `core.config.load`), because a config is code. Imports nothing of the app.
"""

import json
import resource
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

_LONGEST_FILE_BYTES = 32 * 2**20
"""What a config may print, or write into one file: one that does so in an endless loop does not fill the disk."""


def plain(value: Any) -> Any:
    """Values as JSON; types and functions as their dotted name."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if name is None or type(value).__module__.startswith("mmengine"):
        return str(value)
    return f"{module}.{name}"


def failure(error: BaseException, path: str) -> dict[str, Any]:
    """What went wrong and on which line of the config."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        frame.lineno
        for frame in frames
        if frame.filename == path or frame.filename.endswith((".py", "<string>")) is False
    ]
    at = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return {"error": f"{type(error).__name__}: {error}", "line": at}


def limit() -> None:
    """Nothing of what a config does may harm the machine: where memory runs out, this process is the one to be ended."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LONGEST_FILE_BYTES, _LONGEST_FILE_BYTES))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def main(path: str, answer: str) -> int:
    limit()
    from mmengine.config import Config

    try:
        values = plain(Config.fromfile(path).to_dict())
    except BaseException as error:  # noqa: BLE001 - the config is foreign code, whatever it raises (SystemExit too) is the answer
        Path(answer).write_text(json.dumps(failure(error, path)), encoding="utf-8")
        return 1
    Path(answer).write_text(json.dumps({"values": values}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
