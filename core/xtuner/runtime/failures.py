"""Failures of training that have a known cause, turned into errors with a next step. Knows messages, not engines."""

import errno
import traceback
from typing import Final

from core.errors import DanluError, InputError, MachineError

_KNOWN: Final[tuple[tuple[str, type[DanluError], str], ...]] = (
    ("CUDA out of memory", MachineError, "train.out_of_memory"),
    ("DefaultCPUAllocator: can't allocate memory", MachineError, "train.out_of_memory"),
    ("Column 'length' doesn't exist", InputError, "train.no_trained_rows"),
    ("DP world size", InputError, "train.other_world_size_at_load"),
    ("Address already in use", MachineError, "train.port_in_use"),
    ("EADDRINUSE", MachineError, "train.port_in_use"),
    ("No space left on device", MachineError, "train.disk_full"),
    # What torch.save says of a disk that became full while it wrote.
    ("PytorchStreamWriter failed", MachineError, "train.disk_full"),
    ("unexpected pos", MachineError, "train.disk_full"),
)
"""A piece of the message → what it means."""


def explain(error: BaseException) -> DanluError | None:
    """The error in our words, if its cause is known."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return MachineError("train.disk_full")
    text = f"{type(error).__name__}: {error}"
    for piece, kind, code in _KNOWN:
        if piece in text:
            return kind(code)
    return None


def print_traceback(error: BaseException) -> None:
    """Into the log: the words explain, the traceback proves."""
    traceback.print_exception(error)
