"""What the ranks of a run tell one another past the GPUs, from one thread of each at a time.

Knows gloo; not what is told. Words go from process to process, so that a full disk cannot swallow them, and a rank that dies is
missed at once: its connection ends.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

import torch
from torch import distributed

_INTERFACE: Final = "GLOO_SOCKET_IFNAME"
_PATIENCE: Final = timedelta(hours=2)
"""For a rank that lives and says nothing (a disk that hangs). A dying process is held by its writing no longer than this."""
_WORD_BYTES: Final = 4096
_ERROR_LETTERS: Final = 500
"""Of a message: JSON takes six bytes for a letter beyond ASCII."""


class RankLost(Exception):
    """A rank is gone, or was silent for too long: what it does still, nobody knows."""


class Ranks:
    """All ranks of a run, seen from this one. Outlives `destroy_process_group`: a rank that ends early still answers the others."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.is_first: bool = group.rank() == 0

    def gather(self, word: Any) -> list[Any]:
        """What every rank says, in their order; `word` is this one's, anything that JSON holds. Raises RankLost."""
        said = json.dumps(word).encode().ljust(_WORD_BYTES)
        mine = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        heard = [torch.empty_like(mine) for _ in range(self._group.size())]
        try:
            self._group.allgather([heard], [mine]).wait()
        except RuntimeError as error:
            raise RankLost(str(error)) from error
        return [json.loads(bytes(told.tolist())) for told in heard]

    def together(self, do: Callable[[], None]) -> None:
        """Let every rank `do` its part. Returns when all of them have; raises what failed here, or what another rank says failed there.

        Raises RankLost where a rank can no longer say.
        """
        try:
            do()
        except Exception as error:
            with suppress(RankLost):
                self.gather([getattr(error, "errno", None), f"{type(error).__name__}: {error}"[:_ERROR_LETTERS]])
            raise
        for rank, failure in enumerate(self.gather(None)):
            if failure is not None:
                number, text = failure
                heard = f"rank {rank}: {text}"
                raise RuntimeError(heard) if number is None else OSError(number, heard)


class Alone:
    """As `Ranks`, where a rank writes what the others have no part in."""

    is_first = True

    def gather(self, word: Any) -> list[Any]:
        return [word]

    def together(self, do: Callable[[], None]) -> None:
        do()


def is_one_machine() -> bool:
    """Whether all ranks run on this machine, as torchrun says. Several may have folders of the same name on different disks."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(distributed.get_world_size())


def new_group() -> Any:
    """A gloo group of its own for all ranks of this machine, by its loopback, whatever its name resolves to. Every rank must call it."""
    kept = os.environ.get(_INTERFACE)
    os.environ[_INTERFACE] = "lo"
    try:
        return distributed.new_group(backend="gloo", timeout=_PATIENCE)
    finally:
        if kept is None:
            del os.environ[_INTERFACE]
        else:
            os.environ[_INTERFACE] = kept
