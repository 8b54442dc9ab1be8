"""A model and the memory for its conversations, one step on the host at a time: our decoder on the CPU, or any transformers
model. Knows token ids only. (`core.chat.graphs` is the runner for a GPU.)"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from core.chat.cache import RaggedCache
from core.chat.decoder import Decoder
from core.chat.host_step import HostStep
from core.chat.sampling import Sampler


class Step(Protocol):
    """A decoding step that was started."""

    def tokens(self) -> list[int]:
        """The new token of each slot of the step; waits for it."""
        ...


class Runner(Protocol):
    """A model with room for some conversations."""

    slots: int
    max_tokens: int
    """Longest conversation, prompt and answer together."""
    vocabulary: int
    device: torch.device
    chunk_tokens: int
    """A prompt is read in pieces of this many tokens, so that a stop never waits for a long one."""
    runs_ahead: bool
    """The next step can be started before this one's tokens are known."""

    def read(self, slot: int, tokens: list[int], start: int, *, tuned: bool) -> torch.Tensor:
        """Put `tokens` at `start` of `slot`; logits (vocabulary,) after the last."""
        ...

    def begin(self, slot: int, token: int, position: int, *, tuned: bool, sampler: Sampler) -> None:
        """From the next step on `slot` decodes, beginning with `token` at `position`."""
        ...

    def end(self, slot: int) -> None:
        """`slot` decodes no more."""
        ...

    def start_step(self, slots: list[int]) -> Step:
        """One new token in each of `slots`: all that have begun and not ended."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step whose tokens are known already."""

    chosen: list[int]

    def tokens(self) -> list[int]:
        return self.chosen


@dataclass(slots=True)
class _Row:
    token: int
    position: int
    tuned: bool
    sampler: Sampler


class HostRunner:
    """What runners share that choose tokens on the host."""

    chunk_tokens = 256
    runs_ahead = False

    def __init__(self, slots: int, max_tokens: int, vocabulary: int, device: torch.device) -> None:
        self.slots, self.max_tokens, self.vocabulary, self.device = slots, max_tokens, vocabulary, device
        self._rows: dict[int, _Row] = {}

    def step(self, slots: list[int], tokens: list[int], positions: list[int], tuned: list[bool]) -> torch.Tensor:
        """Logits (rows, vocabulary) after one token in each of `slots`."""
        raise NotImplementedError

    def begin(self, slot: int, token: int, position: int, *, tuned: bool, sampler: Sampler) -> None:
        self._rows[slot] = _Row(token, position, tuned, sampler)

    def end(self, slot: int) -> None:
        self._rows.pop(slot, None)

    def start_step(self, slots: list[int]) -> Done:
        rows = [self._rows[slot] for slot in slots]
        logits = self.step(
            slots, [row.token for row in rows], [row.position for row in rows], [row.tuned for row in rows]
        )
        chosen = []
        for row, best, row_logits in zip(rows, logits.argmax(-1).tolist(), logits, strict=True):
            row.token = best if row.sampler.is_greedy else row.sampler.choose(row_logits)
            row.position += 1
            chosen.append(row.token)
        return Done(chosen)


class DecoderRunner(HostRunner):
    """Our decoder with a growing cache a slot: for the CPU."""

    def __init__(self, decoder: Decoder, slots: int, max_tokens: int, *, has_adapter: bool) -> None:
        positions = decoder.config.max_positions
        super().__init__(slots, min(max_tokens, positions), decoder.config.vocabulary, decoder.device)
        self._decoder, self._has_adapter = decoder, has_adapter
        self._cache = RaggedCache(decoder.config, slots, decoder.device)
        self._step = HostStep(decoder, self._cache)
        self.config, self.rounding_error = decoder.config, decoder.rounding_error

    def read(self, slot: int, tokens: list[int], start: int, *, tuned: bool) -> torch.Tensor:
        self._cache.begin([slot], [start], len(tokens))
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        ids = torch.tensor([tokens], device=self.device)
        return self._decoder.forward(ids, positions, self._cache, self._switches([tuned]))[0]

    def step(self, slots: list[int], tokens: list[int], positions: list[int], tuned: list[bool]) -> torch.Tensor:
        self._cache.begin(slots, positions, 1)
        flags = self._switches(tuned)
        return self._step.forward(tokens, positions, None if flags is None else flags[:, 0])

    def _switches(self, tuned: list[bool]) -> torch.Tensor | None:
        return switches(tuned, self._decoder) if self._has_adapter and any(tuned) else None


class TransformersRunner(HostRunner):
    """Any causal model of transformers with its own cache, one row at a time: slower, for families our decoder does not know."""

    def __init__(self, model: Any, slots: int, max_tokens: int) -> None:
        super().__init__(slots, max_tokens, int(model.get_output_embeddings().weight.shape[0]), model.device)
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


def switches(tuned: list[bool], decoder: Decoder) -> torch.Tensor:
    """(rows, 1, 1): 1 for rows that want the adapter."""
    return torch.tensor(tuned, dtype=decoder.dtype, device=decoder.device)[:, None, None]
