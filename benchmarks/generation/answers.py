"""Asks the chat engine, in this process, without its HTTP face."""

import threading
from dataclasses import dataclass, field
from typing import Final

from core.chat.generation import Answer, Engine
from core.chat.sampling import Sampling

_LIMIT_SECONDS: Final = 240.0


@dataclass
class Asked:
    """An answer as it came."""

    tokens: list[int] = field(default_factory=list)
    answer: Answer | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    reason: str = ""

    @property
    def first_token_seconds(self) -> float:
        assert self.answer is not None
        return self.answer.first_token_seconds or 0.0

    @property
    def tokens_per_second(self) -> float:
        assert self.answer is not None
        return (self.answer.count - 1) / self.answer.decode_seconds


def ask(engine: Engine, prompts: list[list[int]], count: int, **settings: float | int) -> list[Asked]:
    """`count` tokens for each of `prompts`, asked all at once. Raises RuntimeError if one of them fails."""
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **settings})  # type: ignore[arg-type]
    all_asked = [_submit(engine, prompt, sampling) for prompt in prompts]
    for asked in all_asked:
        if not asked.ended.wait(_LIMIT_SECONDS):
            raise RuntimeError("an answer did not end")
        if asked.reason != "length":
            error = asked.answer.error if asked.answer else None
            raise RuntimeError(f"an answer ended with {asked.reason!r}: {error!r}") from error
    return all_asked


def _submit(engine: Engine, prompt: list[int], sampling: Sampling) -> Asked:
    asked = Asked()

    def on_end(reason: str) -> None:
        asked.reason = reason
        asked.ended.set()

    asked.answer = Answer(prompt, sampling, frozenset(), asked.tokens.append, on_end)
    engine.submit(asked.answer)
    return asked
