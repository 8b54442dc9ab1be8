"""A model and the memory for its conversations, ready for the engine: our decoder on the CPU, our decoder as CUDA graphs, or
any transformers model. Knows token ids only."""

from typing import Any, Final

import torch

from core.chat.cache import RaggedCache, StaticCache
from core.chat.decoder import Decoder

_WINDOWS: Final = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_ROWS: Final = (1, 2, 4, 8, 16)


class DecoderRunner:
    """Our decoder with a growing cache a slot: for the CPU."""

    def __init__(self, decoder: Decoder, slots: int, max_tokens: int, *, has_adapter: bool) -> None:
        self.slots, self.max_tokens = slots, min(max_tokens, decoder.config.max_positions)
        self.vocabulary, self.device = decoder.config.vocabulary, decoder.device
        self._decoder, self._has_adapter = decoder, has_adapter
        self._cache = RaggedCache(decoder.config, slots, decoder.dtype, decoder.device)

    def read(self, slot: int, tokens: list[int], start: int, *, tuned: bool) -> torch.Tensor:
        self._cache.begin([slot], [start], len(tokens))
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        return self._forward([tokens], positions, [tuned])[0]

    def step(self, slots: list[int], tokens: list[int], positions: list[int], tuned: list[bool]) -> torch.Tensor:
        self._cache.begin(slots, positions, 1)
        return self._forward([[token] for token in tokens], torch.tensor(positions, device=self.device)[:, None], tuned)

    def _forward(self, tokens: list[list[int]], positions: torch.Tensor, tuned: list[bool]) -> torch.Tensor:
        flags = _flags(tuned, self._decoder) if self._has_adapter and any(tuned) else None
        return self._decoder.forward(torch.tensor(tokens, device=self.device), positions, self._cache, flags)


class GraphRunner:
    """Our decoder with a static cache; on CUDA each decoding step is one captured graph per batch size and window."""

    def __init__(
        self, decoder: Decoder, slots: int, max_tokens: int, *, has_adapter: bool, is_compiled: bool = False
    ) -> None:
        """`is_compiled`: let torch.compile join small operations before the capture (needs Triton)."""
        self.slots, self.max_tokens = slots, min(max_tokens, decoder.config.max_positions)
        self.vocabulary, self.device = decoder.config.vocabulary, decoder.device
        self._decoder, self._has_adapter = decoder, has_adapter
        self._cache = StaticCache(decoder.config, slots, self.max_tokens, decoder.dtype, decoder.device)
        self._forward = torch.compile(decoder.forward, dynamic=False) if is_compiled else decoder.forward
        self._tokens = torch.zeros((slots, 1), dtype=torch.long, device=self.device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._tuned = torch.zeros((slots, 1, 1), dtype=decoder.dtype, device=self.device)
        self._graphs: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
        self._pool: Any = None

    def read(self, slot: int, tokens: list[int], start: int, *, tuned: bool) -> torch.Tensor:
        self._cache.begin_prompt(slot, start)
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        flags = _flags([tuned], self._decoder) if self._has_adapter and tuned else None
        return self._decoder.forward(torch.tensor([tokens], device=self.device), positions, self._cache, flags)[0]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(self, slots: list[int], tokens: list[int], positions: list[int], tuned: list[bool]) -> torch.Tensor:
        rows = next((count for count in _ROWS if count > max(slots)), self.slots)
        rows = min(rows, self.slots)
        window = min(next((size for size in _WINDOWS if size > max(positions)), self.max_tokens), self.max_tokens)
        row_tokens, row_tuned = [0] * rows, [0.0] * rows
        # An idle row writes to the spare place behind the last, which no window reaches.
        row_positions = [self.max_tokens] * rows
        for slot, token, position, flag in zip(slots, tokens, positions, tuned, strict=True):
            row_tokens[slot], row_positions[slot], row_tuned[slot] = token, position, float(flag)
        self._tokens[:rows, 0] = torch.tensor(row_tokens, device=self.device)
        self._positions[:rows] = torch.tensor(row_positions, device=self.device)
        self._tuned[:rows, 0, 0] = torch.tensor(row_tuned, dtype=self._tuned.dtype, device=self.device)
        return self._run(rows, window)[slots]

    def _run(self, rows: int, window: int) -> torch.Tensor:
        if self.device.type != "cuda":
            return self._compute(rows, window)
        key = (rows, window)
        if key not in self._graphs:
            self._graphs[key] = self._capture(rows, window)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _compute(self, rows: int, window: int) -> torch.Tensor:
        positions = self._positions[:rows]
        self._cache.begin_step(positions, window)
        flags = self._tuned[:rows] if self._has_adapter else None
        # Positions of idle rows lie one behind the table of rotations; any angle will do for them.
        angles = positions.clamp(max=self.max_tokens - 1)[:, None]
        return self._forward(self._tokens[:rows], angles, self._cache, flags)

    def _capture(self, rows: int, window: int) -> tuple[Any, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute(rows, window)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._compute(rows, window)
        self._pool = self._pool or graph.pool()
        return graph, logits


class TransformersRunner:
    """Any causal model of transformers with its own cache, one row at a time: slower, for families our decoder does not know."""

    def __init__(self, model: Any, slots: int, max_tokens: int) -> None:
        self.slots, self.max_tokens = slots, max_tokens
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.device: torch.device = model.device
        self._model = model
        self._caches: list[Any] = [None] * slots
        self._has_switch = hasattr(model, "disable_adapter")

    def read(self, slot: int, tokens: list[int], start: int, *, tuned: bool) -> torch.Tensor:
        from transformers import DynamicCache

        cache = self._caches[slot]
        if start == 0 or cache is None:
            cache = self._caches[slot] = DynamicCache()
        elif cache.get_seq_length() > start:
            cache.crop(start)
        return self._forward(slot, tokens, start, tuned=tuned)

    def step(self, slots: list[int], tokens: list[int], positions: list[int], tuned: list[bool]) -> torch.Tensor:
        rows = zip(slots, tokens, positions, tuned, strict=True)
        return torch.stack([self._forward(slot, [token], at, tuned=flag) for slot, token, at, flag in rows])

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _forward(self, slot: int, tokens: list[int], start: int, *, tuned: bool) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.device)
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones((1, start + len(tokens)), dtype=torch.long, device=self.device),
            "position_ids": torch.arange(start, start + len(tokens), device=self.device)[None],
            "past_key_values": self._caches[slot],
            "use_cache": True,
        }
        if self._has_switch and not tuned:
            with self._model.disable_adapter():
                output = self._model(**arguments)
        else:
            output = self._model(**arguments)
        self._caches[slot] = output.past_key_values
        logits: torch.Tensor = output.logits[0, -1]
        return logits


def _flags(tuned: list[bool], decoder: Decoder) -> torch.Tensor:
    return torch.tensor(tuned, dtype=decoder.dtype, device=decoder.device)[:, None, None]
