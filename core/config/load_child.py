"""Reads one config with mmengine and prints its plain values: `python -m core.config.load_child CONFIG`.

Runs in its own process with a time limit (see `core.config.load`), because a config is code. Imports nothing of the app.
"""

import json
import sys
import traceback
from typing import Any

MARK = "DANLU-CONFIG:"


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


def main(path: str) -> int:
    from mmengine.config import Config

    try:
        values = plain(Config.fromfile(path).to_dict())
    except BaseException as error:  # noqa: BLE001 - the config is foreign code, whatever it raises (SystemExit too) is the answer
        print(MARK + json.dumps(failure(error, path)))
        return 1
    print(MARK + json.dumps({"values": values}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
