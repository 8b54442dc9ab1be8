"""Keys and values of past tokens, one slot a conversation, and the attention over them. Knows no weights.

`RaggedCache` (CPU): each slot as long as it needs, attention row by row, nothing masked in vain.
`StaticCache` (CUDA): one block of memory at fixed addresses, so that a decoding step can be captured as a graph.
"""

from typing import Final, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from core.chat.weights import DecoderConfig

_GROW_TOKENS: Final = 256


class Cache(Protocol):
    """What the decoder asks of a cache."""

    def extend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Store key and value (rows, kv_heads, tokens, head_dim) of one layer; the attention of `query` over all so far."""
        ...


class RaggedCache:
    """A growing block a slot. `begin` says which slots and positions the next forward pass is for."""

    def __init__(self, config: DecoderConfig, slots: int, device: torch.device) -> None:
        """Held and computed in float32: on a CPU there is room, and small products are fastest in it."""
        self._shape = (config.layers, 2, config.kv_heads)
        self._head_dim = config.head_dim
        self._groups = config.heads // config.kv_heads
        self._dtype, self._device = torch.float32, device
        empty = torch.empty((*self._shape, 0, self._head_dim), dtype=self._dtype, device=device)
        self._blocks = [empty] * slots
        self._layers = [_by_layer(empty)] * slots
        """Views into the blocks: (keys, values) of each layer, (kv_heads, room, head_dim)."""
        self._rows: list[tuple[int, int]] = []

    def begin(self, slots: list[int], starts: list[int], tokens: int) -> None:
        """The next pass adds `tokens` tokens to each of `slots`, the first at its position in `starts`."""
        self._rows = list(zip(slots, starts, strict=True))
        for slot, start in self._rows:
            self._reserve(slot, start + tokens)

    def extend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        wide = query.to(self._dtype)
        parts = zip(self._rows, wide.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([self._read(layer, *part) for part in parts]).to(query.dtype)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `extend` for one new token in each row: query (rows, heads, head_dim), scaled already; key and value
        (rows, kv_heads, head_dim). Gives (rows, heads · head_dim)."""
        if len(self._rows) == 1:
            return self._attend(layer, self._rows[0], query, key[0], value[0])
        parts = zip(self._rows, query, key, value, strict=True)
        return torch.cat([self._attend(layer, *part) for part in parts])

    def _attend(
        self, layer: int, row: tuple[int, int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /
    ) -> torch.Tensor:
        slot, place = row
        keys, values = self._layers[slot][layer]
        keys.select(1, place).copy_(key)
        values.select(1, place).copy_(value)
        past_keys, past_values = keys.narrow(1, 0, place + 1), values.narrow(1, 0, place + 1)
        # The query heads of a key-value head are its rows, so nothing needs repeating or masking; and so little work is
        # done soonest without waking a second thread, as scaled_dot_product_attention would.
        grouped = query.reshape(self._shape[2], self._groups, self._head_dim)
        shares = torch.bmm(grouped, past_keys.transpose(1, 2)).softmax(-1)
        return torch.bmm(shares, past_values).view(1, -1)

    def _read(
        self, layer: int, row: tuple[int, int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /
    ) -> torch.Tensor:
        (slot, start), tokens = row, key.shape[2]
        keys, values = self._layers[slot][layer]
        end = start + tokens
        keys[:, start:end] = key[0]
        values[:, start:end] = value[0]
        mask = None if start == 0 else _causal_mask(start, tokens, query.device)
        return scaled_dot_product_attention(
            query, keys[None, :, :end], values[None, :, :end], attn_mask=mask, is_causal=mask is None,
            enable_gqa=self._groups > 1,
        )  # fmt: skip

    def _reserve(self, slot: int, tokens: int) -> None:
        block = self._blocks[slot]
        held = block.shape[3]
        if held >= tokens:
            return
        room = max(held * 2, (tokens + _GROW_TOKENS - 1) // _GROW_TOKENS * _GROW_TOKENS)
        grown = torch.zeros((*self._shape, room, self._head_dim), dtype=self._dtype, device=self._device)
        grown[:, :, :, :held] = block
        self._blocks[slot], self._layers[slot] = grown, _by_layer(grown)


def _by_layer(block: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer[0], layer[1]) for layer in block]


def slot_bytes(config: DecoderConfig, length: int, dtype: torch.dtype) -> int:
    """Memory of one slot of a `StaticCache`."""
    return 2 * config.layers * config.kv_heads * (length + 1) * config.head_dim * int(dtype.itemsize)


class StaticCache:
    """`length` tokens a slot at fixed addresses. A row that is idle writes to a spare last place that nobody reads."""

    def __init__(
        self, config: DecoderConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.layers, 2, slots, config.kv_heads, length + 1, config.head_dim)
        self._block = torch.zeros(shape, dtype=dtype, device=device)
        self._groups = config.heads // config.kv_heads
        self.length = length
        self._slot = 0
        self._start = 0
        self.window = length
        """How many places a decoding step looks at: the graph for short conversations reads less memory."""
        self.positions: torch.Tensor | None = None
        """(rows,) place of each row's new token in a decoding step; None while a prompt is read."""

    def layer(self, layer: int) -> torch.Tensor:
        """Keys and values of one layer: (2, slots, kv_heads, length + 1, head_dim)."""
        return self._block[layer]

    def begin_prompt(self, slot: int, start: int) -> None:
        self.positions, self._slot, self._start = None, slot, start

    def begin_step(self, positions: torch.Tensor, window: int) -> None:
        self.positions, self.window = positions, window

    def extend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            return self._extend_prompt(layer, query, key, value)
        rows = query.shape[0]
        keys, values = self._block[layer][:, :rows]
        index = self.positions.view(rows, 1, 1, 1).expand(-1, key.shape[1], 1, key.shape[3])
        keys.scatter_(2, index, key)
        values.scatter_(2, index, value)
        places = torch.arange(self.window, device=query.device)
        mask = (places[None] <= self.positions[:, None])[:, None, None]
        grouped = query.view(rows, key.shape[1], self._groups, key.shape[3])
        attended = scaled_dot_product_attention(
            grouped, keys[:, :, : self.window], values[:, :, : self.window], attn_mask=mask
        )
        return attended.view(query.shape)

    def _extend_prompt(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = self._block[layer][:, self._slot : self._slot + 1]
        end = self._start + key.shape[2]
        keys[:, :, self._start : end] = key
        values[:, :, self._start : end] = value
        mask = None if self._start == 0 else _causal_mask(self._start, key.shape[2], query.device)
        return scaled_dot_product_attention(
            query,
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self._groups > 1,
        )


def _causal_mask(start: int, tokens: int, device: torch.device) -> torch.Tensor:
    """(tokens, start + tokens): True where a new token may look."""
    places = torch.arange(start + tokens, device=device)
    return places[None] <= (places[start:, None])
