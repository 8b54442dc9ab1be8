"""The decoding loop: several answers share each step, each conversation keeps its keys and values for its next turn.

Runs in one thread of its own; requests come in from any thread and give back tokens through a callback. Knows token ids,
no text and no HTTP.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from core.chat.runners import Runner, Step
from core.chat.sampling import Sampler, Sampling


@dataclass
class Answer:
    """One request and how far its answer is. `on_token(token)`, `on_end(reason)` are called in the engine's thread."""

    prompt: list[int]
    sampling: Sampling
    stop_tokens: frozenset[int]
    on_token: Callable[[int], None]
    on_end: Callable[[str], None]
    """Reason: stop, length, cancelled, or error (then `error` says which)."""
    is_tuned: bool = True
    error: Exception | None = None
    cached_tokens: int = 0
    count: int = 0
    asked_at: float = field(default_factory=time.perf_counter)
    first_token_seconds: float | None = None
    decode_seconds: float = 0.0
    """From the first token to the last."""
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Takes effect before the next step."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass(eq=False)
class _Slot:
    """One conversation's place. `held` are the tokens whose keys and values it keeps, and with which weights."""

    held: list[int] = field(default_factory=list)
    is_tuned: bool = True
    used_at: float = 0.0
    answer: Answer | None = None
    sampler: Sampler | None = None
    waiting: list[int] = field(default_factory=list)
    """Prompt tokens not yet read."""
    next_token: int = 0
    """Chosen, and not yet held."""

    @property
    def is_decoding(self) -> bool:
        return self.answer is not None and not self.waiting


@dataclass(frozen=True, slots=True)
class _Started:
    """A step on its way, and whose answers its tokens belong to: by the time they come an answer may have ended."""

    step: Step
    rows: list[tuple[_Slot, Answer]]


class Engine:
    """Answers requests until closed."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._slots = [_Slot() for _ in range(runner.slots)]
        self._started: _Started | None = None
        self._queue: deque[Answer] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        with self._wake:
            self._queue.append(answer)
            self._wake.notify()

    def close(self) -> None:
        """End all answers and the thread."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join(timeout=10)

    @property
    def is_busy(self) -> bool:
        with self._wake:
            return bool(self._queue) or any(slot.answer for slot in self._slots)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._is_closed or self._queue or any(slot.answer for slot in self._slots)):
                    self._wake.wait()
                if self._is_closed:
                    break
            self._admit()
            try:
                self._advance()
            except (RuntimeError, MemoryError, ValueError, IndexError) as error:
                self._fail(error)
        for number in range(len(self._slots)):
            self._end(number, "cancelled")
        for answer in self._queue:
            answer.on_end("cancelled")

    def _advance(self) -> None:
        for number, slot in enumerate(self._slots):
            if slot.answer is not None and slot.answer.is_cancelled:
                self._end(number, "cancelled")
        for number, slot in enumerate(self._slots):
            if slot.answer is not None and slot.waiting:
                self._read(number, slot)
        started = self._start_step()
        if self._runner.runs_ahead:
            started, self._started = self._started, started
        if started is not None:
            self._deliver(started)

    def _start_step(self) -> _Started | None:
        active = [number for number, slot in enumerate(self._slots) if slot.is_decoding]
        if not active:
            return None
        slots = [self._slots[number] for number in active]
        return _Started(
            self._runner.start_step(active), [(slot, slot.answer) for slot in slots if slot.answer is not None]
        )

    def _deliver(self, started: _Started) -> None:
        for (slot, answer), token in zip(started.rows, started.step.tokens(), strict=True):
            if slot.answer is answer:
                slot.held.append(slot.next_token)
                self._take(slot, token)

    def _admit(self) -> None:
        while True:
            with self._wake:
                free = [slot for slot in self._slots if slot.answer is None]
                if not self._queue or not free:
                    return
                answer = self._queue.popleft()
            if answer.is_cancelled:
                answer.on_end("cancelled")
                continue
            slot = max(free, key=lambda each: (_shared(each, answer), -each.used_at))
            # The last prompt token is read again even if it is held: its logits give the first token of the answer.
            kept = min(_shared(slot, answer), len(answer.prompt) - 1)
            answer.cached_tokens = kept
            slot.held, slot.waiting = answer.prompt[:kept], answer.prompt[kept:]
            slot.answer, slot.is_tuned = answer, answer.is_tuned
            runner = self._runner
            slot.sampler = Sampler(answer.sampling, runner.vocabulary, answer.prompt, runner.device, runner.max_tokens)

    def _read(self, number: int, slot: _Slot) -> None:
        size = self._runner.chunk_tokens
        chunk, slot.waiting = slot.waiting[:size], slot.waiting[size:]
        logits = self._runner.read(number, chunk, len(slot.held), tuned=slot.is_tuned)
        slot.held += chunk
        sampler = slot.sampler
        if slot.waiting or sampler is None:
            return
        token = sampler.choose(logits)
        self._take(slot, token)
        if slot.is_decoding:
            self._runner.begin(number, token, len(slot.held), tuned=slot.is_tuned, sampler=sampler)

    def _take(self, slot: _Slot, token: int) -> None:
        """The next token of `slot`'s answer, and whether it is the last."""
        answer = slot.answer
        assert answer is not None
        elapsed = time.perf_counter() - answer.asked_at
        if answer.first_token_seconds is None:
            answer.first_token_seconds = elapsed
        answer.decode_seconds = elapsed - answer.first_token_seconds
        answer.count += 1
        if token in answer.stop_tokens and not answer.sampling.ignore_eos:
            self._end(self._slots.index(slot), "stop")
            return
        slot.next_token = token
        answer.on_token(token)
        longest = answer.sampling.max_tokens
        if (longest is not None and answer.count >= longest) or len(slot.held) + 1 >= self._runner.max_tokens:
            self._end(self._slots.index(slot), "length")

    def _end(self, number: int, reason: str) -> None:
        slot = self._slots[number]
        answer, slot.answer, slot.sampler = slot.answer, None, None
        self._runner.end(number)
        slot.waiting, slot.used_at = [], time.monotonic()
        if answer is not None:
            answer.on_end(reason)

    def _fail(self, error: Exception) -> None:
        """A step broke (memory, most often): its answers end with the error, the engine goes on with empty slots."""
        self._started = None
        for number, slot in enumerate(self._slots):
            if slot.answer is not None:
                slot.answer.error = error
                self._end(number, "error")
            slot.held = []
        if self._runner.device.type == "cuda":
            torch.cuda.empty_cache()


def _shared(slot: _Slot, answer: Answer) -> int:
    """How many tokens of the prompt the slot holds already, computed with the same weights."""
    if slot.is_tuned != answer.is_tuned:
        return 0
    count = 0
    for held, asked in zip(slot.held, answer.prompt, strict=False):
        if held != asked:
            break
        count += 1
    return count
