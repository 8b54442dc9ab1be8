"""Our decoder on a GPU: a step is one captured CUDA graph that also chooses its tokens, so the host only starts it and reads
tokens one step late. On the CPU (tests) the same steps run without a graph."""

from dataclasses import dataclass
from typing import Any, Final

import torch

from core.chat.cache import StaticCache
from core.chat.decoder import Decoder
from core.chat.runners import switches
from core.chat.sampling import SETTINGS, Sampler, sample_rows, settings_row

_WINDOWS: Final = (1024, 4096, 16384, 65536)
_ROWS: Final = (1, 2, 4, 8, 16)
_RING: Final = 4
"""Steps whose tokens can be on their way to the host at a time."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step that the GPU may still be at work on."""

    event: Any
    chosen: torch.Tensor
    rows: int

    def tokens(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return [int(token) for token in self.chosen[: self.rows].tolist()]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What one graph is for."""

    rows: int
    window: int
    is_sampled: bool


class GraphRunner:
    """A static cache and the state of every slot at fixed addresses; a graph for each batch size, with sampling or greedy."""

    chunk_tokens = 2048
    runs_ahead = True

    def __init__(
        self, decoder: Decoder, slots: int, max_tokens: int, *, has_adapter: bool, is_fused: bool = False
    ) -> None:
        """`is_fused`: use `core.chat.kernels` (see `core.chat.fused.can_fuse`) instead of torch's operations."""
        self.slots, self.max_tokens = slots, min(max_tokens, decoder.config.max_positions)
        self.vocabulary, self.device = decoder.config.vocabulary, decoder.device
        self._decoder, self._has_adapter = decoder, has_adapter
        self._cache = StaticCache(decoder.config, slots, self.max_tokens, decoder.dtype, decoder.device)
        self._fused: Any = None
        if is_fused:
            from core.chat.fused import FusedStep

            self._fused = FusedStep(decoder, self._cache, slots)
        self._places = [self.max_tokens] * slots
        """Where each slot's next token goes, as far as steps have been started; max_tokens: idle."""
        self._sampled: set[int] = set()
        self._graphs: dict[_Kind, Any] = {}
        self._pool: Any = None
        self._turn = 0
        with torch.inference_mode():
            self._make_state(slots)

    def _make_state(self, slots: int) -> None:
        """One entry a slot, and one more for rows of a batch that nobody needs: it is always idle."""
        device = self.device
        self._tokens = torch.zeros(slots + 1, dtype=torch.long, device=device)
        self._positions = torch.full((slots + 1,), self.max_tokens, dtype=torch.long, device=device)
        self._tuned = torch.zeros((slots + 1, 1), dtype=self._decoder.dtype, device=device)
        self._settings = torch.ones((slots + 1, SETTINGS), device=device)
        self._seen = torch.zeros((slots + 1, self.vocabulary), dtype=torch.bool, device=device)
        self._is_seen = torch.ones((), dtype=torch.bool, device=device)
        self._points = torch.zeros((slots + 1, self.max_tokens + 1), device=device)
        self._order = torch.full((slots,), slots, dtype=torch.long, device=device)
        self._ordered: list[int] = []
        self._chosen = torch.zeros(slots, dtype=torch.long, device=device)
        is_cuda = device.type == "cuda"
        self._ring = [torch.zeros(slots, dtype=torch.long, pin_memory=is_cuda) for _ in range(_RING)]

    @property
    def is_fused(self) -> bool:
        return self._fused is not None

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def read(self, slot: int, tokens: list[int], start: int, *, tuned: bool) -> torch.Tensor:
        self._cache.begin_prompt(slot, start)
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        flags = switches([tuned], self._decoder) if self._has_adapter and tuned else None
        return self._decoder.forward(torch.tensor([tokens], device=self.device), positions, self._cache, flags)[0]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def begin(self, slot: int, token: int, position: int, *, tuned: bool, sampler: Sampler) -> None:
        self._places[slot] = position
        self._tokens[slot] = token
        self._positions[slot] = position
        self._tuned[slot] = float(tuned)
        self._sampled.discard(slot)
        if sampler.is_greedy:
            self._settings[slot, 0] = 0.0
            self._settings[slot, -1] = 1.0
            return
        self._sampled.add(slot)
        self._settings[slot] = torch.tensor(settings_row(sampler.sampling), device=self.device)
        # The token after the one at `position` is the answer's next: its point lies at that place.
        points = sampler.points[sampler.count : sampler.count + self.max_tokens - position]
        self._points[slot, position : position + len(points)] = points.to(self.device)
        if sampler.seen is None:
            self._seen[slot] = False
        else:
            self._seen[slot] = sampler.seen

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def end(self, slot: int) -> None:
        self._places[slot] = self.max_tokens
        self._positions[slot] = self.max_tokens
        self._sampled.discard(slot)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def start_step(self, slots: list[int]) -> _Ahead:
        kind = self._kind(slots)
        order = self._rows_of(slots, kind.rows)
        if order != self._ordered:
            self._order[: len(order)] = torch.tensor(order, device=self.device)
            self._ordered = order
        self._run(kind)
        for slot in slots:
            self._places[slot] = min(self._places[slot] + 1, self.max_tokens)
        self._turn = (self._turn + 1) % _RING
        host = self._ring[self._turn]
        host[: kind.rows].copy_(self._chosen[: kind.rows], non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        if self.is_fused:
            return _Ahead(event, host, len(slots))
        return _Ahead(event, host, kind.rows) if slots == order else _Picked(event, host, kind.rows, slots)

    def _kind(self, slots: list[int]) -> _Kind:
        needed = len(slots) if self.is_fused else max(slots) + 1
        rows = min(next((count for count in _ROWS if count >= needed), self.slots), self.slots)
        window = self.max_tokens
        if not self.is_fused:
            furthest = max(self._places[slot] for slot in slots)
            window = min(next((size for size in _WINDOWS if size > furthest), window), window)
        return _Kind(rows, window, any(slot in self._sampled for slot in slots))

    def _rows_of(self, slots: list[int], rows: int) -> list[int]:
        """Which slot each row is: with our kernels any; torch's attention needs row i to be slot i."""
        if self.is_fused:
            return slots + [self.slots] * (rows - len(slots))
        return list(range(rows))

    def _run(self, kind: _Kind) -> None:
        if self.device.type != "cuda":
            self._compute(kind)
            return
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind)
        self._graphs[kind].replay()

    def _compute(self, kind: _Kind) -> None:
        """One token further in every row: forward pass, choice, and the state for the next step."""
        order = self._order[: kind.rows]
        positions = self._positions[order]
        logits = self.logits(order, positions, kind.window)
        if kind.is_sampled:
            points = self._points[order, positions]
            chosen = sample_rows(logits, self._settings[order], self._seen[order], points)
            self._seen.index_put_((order, chosen), self._is_seen)
        else:
            chosen = logits.argmax(-1)
        self._chosen[: kind.rows] = chosen
        self._tokens[order] = chosen
        self._positions[order] = positions + (positions < self.max_tokens)

    def logits(self, order: torch.Tensor, positions: torch.Tensor, window: int) -> torch.Tensor:
        """(rows, vocabulary) after the next token of each slot in `order`."""
        tokens = self._tokens[order]
        tuned = self._tuned[order] if self._has_adapter else None
        if self._fused is not None:
            logits: torch.Tensor = self._fused.forward(tokens, order, positions, tuned)
            return logits
        self._cache.begin_step(positions, window)
        # Positions of idle rows lie one behind the table of rotations; any angle will do for them.
        angles = positions.clamp(max=self.max_tokens - 1)[:, None]
        return self._decoder.forward(tokens[:, None], angles, self._cache, None if tuned is None else tuned[:, :, None])

    def _capture(self, kind: _Kind) -> Any:
        """Run it twice so that everything is compiled and allocated, put the state back, and record it."""
        state = (self._tokens, self._positions, self._seen, self._chosen)
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute(kind)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._compute(kind)
        self._pool = self._pool or graph.pool()
        return graph

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def warm_up(self) -> None:
        """Capture the graphs before the first question, so that its first token is quick; read a prompt once."""
        self.read(0, [0] * 64, 0, tuned=True)
        if self.device.type != "cuda":
            return
        for rows in (count for count in _ROWS if count <= self.slots):
            for is_sampled in (False, True):
                kind = _Kind(rows, self.max_tokens if self.is_fused else min(_WINDOWS[0], self.max_tokens), is_sampled)
                order = self._rows_of(list(range(rows)), rows)
                self._order[: len(order)] = torch.tensor(order, device=self.device)
                self._ordered = order
                self._graphs[kind] = self._capture(kind)
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class _Picked(_Ahead):
    """A step in which row i is slot i, and only some of them count."""

    slots: list[int]

    def tokens(self) -> list[int]:
        tokens = _Ahead.tokens(self)
        return [tokens[slot] for slot in self.slots]
