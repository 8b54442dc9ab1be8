"""How often something may ask the disk: each time where the disk answers at once, seldom where it is slow. Stdlib only; knows no files.

A project may lie on a network share, where a look at a file takes tens of milliseconds and a write several times that. Work that
looks for a stop at every step, or notes its progress five times a second, would spend its time on that.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")
_REMEMBERED: Final = 3
_QUICK_SECONDS: Final = 5e-4
"""What takes less is done as often as it is wanted."""
_SLOW_SECONDS: Final = 2e-3
"""For one answer: threads would cost more than they save below that."""
_AT_ONCE: Final = 16


class Pace:
    """Keeps one kind of question to the disk to a `share` of the time, with pauses of `longest_seconds` at most."""

    def __init__(
        self, share: float = 0.01, longest_seconds: float = 5.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._share, self._longest_seconds, self._now = share, longest_seconds, now
        self._took: deque[float] = deque(maxlen=_REMEMBERED)
        self._due_at = 0.0

    def is_due(self) -> bool:
        """Whether the pause after the last time is over."""
        return self._now() >= self._due_at

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Around the question itself: its time counts. One that was slow may be the machine's fault; three in a row are the disk's."""
        begun = self._now()
        try:
            yield
        finally:
            ended = self._now()
            self._took.append(ended - begun)
            quickest = min(self._took)
            if len(self._took) == _REMEMBERED and quickest > _QUICK_SECONDS:
                self._due_at = ended + min(quickest / self._share, self._longest_seconds)


def ask_all(
    ask: Callable[[_Asked], _Answer], about: Iterable[_Asked], now: Callable[[], float] = time.monotonic
) -> list[_Answer]:
    """`ask` for each of `about`, in their order; many at once where the first answers show that the disk is slow.

    A disk far away answers sixteen questions in the time of one. `ask` reads files and knows no session.
    """
    waiting = deque(about)
    answers: list[_Answer] = []
    took: list[float] = []
    while waiting:
        if len(took) == _REMEMBERED and min(took) > _SLOW_SECONDS:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                return [*answers, *pool.map(ask, waiting)]
        begun = now()
        answers.append(ask(waiting.popleft()))
        took = [*took[1 - _REMEMBERED :], now() - begun]
    return answers
