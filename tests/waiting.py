"""Waiting for a run's end, which no page ever does."""

import time

from core.runs.directory import RunDirectory
from core.runs.state import read_status


def has_stopped(run: RunDirectory, timeout_seconds: float) -> bool:
    """Wait until `run` is no longer active; False if it still is after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while read_status(run).phase.is_active:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
