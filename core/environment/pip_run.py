"""Runs pip: its output is passed on, its failure becomes an error with a reason. Knows nothing of what is installed. Stdlib only."""

import os
import subprocess
from typing import Final

from core.errors import MachineError

_OFFLINE_SIGNS: Final = (
    "NewConnectionError",
    "NameResolutionError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "ConnectTimeoutError",
    "ProxyError",
    "SSLError",
)
_NOT_OURS: Final = ("PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
"""Would have pip look at or write to something other than the environment it runs in."""
_TAIL_LINES: Final = 12


def run_pip(command: "list[str]") -> None:
    """Run pip with its output passed on line by line. Raises MachineError with its last lines if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
    tail = [""]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                tail = [*tail, line.rstrip()][-_TAIL_LINES:]
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    if code == 0:
        return
    text = "\n".join(tail)
    if "No space left on device" in text:
        raise MachineError("environment.disk_full", reason=text)
    if any(sign in text for sign in _OFFLINE_SIGNS):
        raise MachineError("environment.no_network", reason=text)
    raise MachineError("environment.pip_failed", code=code, reason=text)
