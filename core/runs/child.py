"""Follows a child process of a job: its output goes to the job's log line by line, and a cancelled job ends it with all it started."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

TICK_SECONDS: Final = 0.3
_ENDS: Final = re.compile(rb"[\r\n]")
_CONTROL: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""What moves the cursor or colours a terminal."""
_BAR: Final = re.compile(r"\d+%\|.*\||\d+it \[")


def follow(
    command: Sequence[str],
    on_line: Callable[[str], None],
    on_tick: Callable[[], None],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run `command` to its end and return its exit code. `on_line` gets each line it prints, drawings of progress bars too;
    `on_tick` is called a few times a second. What either of them raises ends the child and passes through."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=None if env is None else dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    pending = b""
    try:
        while True:
            is_over = process.poll() is not None
            pending += process.stdout.read() or b""
            *lines, pending = _ENDS.split(pending)
            if is_over:
                lines.append(pending)
            for line in (_CONTROL.sub("", raw.decode("utf-8", "replace")) for raw in lines):
                if line.strip() and not is_drawing(line):
                    print(line, flush=True)
                if line.strip():
                    on_line(line)
            on_tick()
            if is_over:
                return process.returncode
            time.sleep(TICK_SECONDS)
    finally:
        end(process)


def is_drawing(line: str) -> bool:
    """Whether `line` is a progress bar, which draws itself again and again: it would fill a log."""
    return _BAR.search(line) is not None


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a child and what it started, if it still lives."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
