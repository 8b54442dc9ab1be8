"""Has mmengine read a config the way training does, in a process of its own with a time limit."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from core.config.source import ConfigSource
from core.errors import InputError, MachineError
from core.files import read_json

_APP_ROOT: Final = Path(__file__).parents[2]
_LONGEST_REASON: Final = 400


def load_values(text: str, *, python: str = sys.executable, timeout_seconds: float = 180.0) -> dict[str, Any]:
    """The values `Config.fromfile` gives for a config's text, as JSON types; classes and functions as dotted names.

    This runs the config: only call it when a person asks for it. Raises InputError `config.syntax`, `config.does_not_load`
    (reason, line), `config.takes_too_long`, MachineError `config.no_mmengine`.
    """
    ConfigSource(text)
    with tempfile.TemporaryDirectory(prefix="danlu-config-") as folder:
        config, answered = Path(folder) / "config.py", Path(folder) / "answer.json"
        config.write_bytes(text.encode("utf-8"))
        ended, output = _run([python, "-m", "core.config.load_child", str(config), str(answered)], timeout_seconds)
        if not answered.exists():
            if ended < 0:
                raise InputError("config.does_not_load", reason=signal.Signals(-ended).name, line="?")
            raise MachineError("config.no_mmengine", python=python, reason=output)
        answer = read_json(answered)
    if "error" in answer:
        raise InputError("config.does_not_load", reason=answer["error"][:_LONGEST_REASON], line=answer["line"] or "?")
    values: dict[str, Any] = answer["values"]
    return values


def _run(argv: list[str], timeout_seconds: float) -> tuple[int, str]:
    """Exit code and the end of the output of a command; its whole process group is ended at the time limit."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Into a file, which the child limits: what an endless loop prints would fill this process's memory.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            argv,
            cwd=_APP_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            ended = process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise InputError("config.takes_too_long", seconds=round(timeout_seconds)) from error
        output.seek(max(0, output.seek(0, os.SEEK_END) - _LONGEST_REASON))
        return ended, output.read().decode("utf-8", errors="replace").strip()
