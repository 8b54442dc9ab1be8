"""Has mmengine read a config the way training does, in a process of its own with a time limit."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from core.config.load_child import MARK
from core.config.source import ConfigSource
from core.errors import InputError, MachineError

_APP_ROOT: Final = Path(__file__).parents[2]
_LONGEST_REASON: Final = 400


def load_values(text: str, *, python: str = sys.executable, timeout_seconds: float = 60.0) -> dict[str, Any]:
    """The values `Config.fromfile` gives for a config's text, as JSON types; classes and functions as dotted names.

    This runs the config: only call it when a person asks for it. Raises InputError `config.syntax`, `config.does_not_load`
    (reason, line), `config.takes_too_long`, MachineError `config.no_mmengine`.
    """
    ConfigSource(text)
    with tempfile.TemporaryDirectory(prefix="danlu-config-") as folder:
        file = Path(folder) / "config.py"
        file.write_bytes(text.encode("utf-8"))
        output = _run([python, "-m", "core.config.load_child", str(file)], timeout_seconds)
    line = next((line for line in reversed(output.splitlines()) if line.startswith(MARK)), None)
    if line is None:
        raise MachineError("config.no_mmengine", python=python, reason=output.strip()[-_LONGEST_REASON:])
    answer = json.loads(line.removeprefix(MARK))
    if "error" in answer:
        raise InputError("config.does_not_load", reason=answer["error"][:_LONGEST_REASON], line=answer["line"] or "?")
    values: dict[str, Any] = answer["values"]
    return values


def _run(argv: list[str], timeout_seconds: float) -> str:
    """Output of a command; its whole process group is ended at the time limit."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        argv,
        cwd=_APP_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=timeout_seconds)[0]
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise InputError("config.takes_too_long", seconds=round(timeout_seconds)) from error
