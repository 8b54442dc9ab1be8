"""The fast forward pass: the same arithmetic as the stock model in training mode, over a flat sequence of tokens.

Computes with the model's own weights and leaves its modules alone, so that generation and saving go their usual way.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from core.xtuner.runtime.speed import loss as head_loss
from core.xtuner.runtime.speed.anatomy import Decoder, Layer, Norm
from core.xtuner.runtime.speed.attention import attend
from core.xtuner.runtime.speed.backend import uses_kernels
from core.xtuner.runtime.speed.batches import Pass
from core.xtuner.runtime.speed.linear import AdaptedLinear, Draw, LinearGroup, SwigluLinear

_SEED_LIMIT: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOptions:
    """How to compute a pass. None of these changes what is computed, only how."""

    dtype: torch.dtype
    """Of the matrix products: what autocast would use."""
    recomputed_layers: int = 0
    """How many layers are computed again in the backward pass instead of keeping what they need."""
    block_tokens: int = head_loss.BLOCK_TOKENS
    """Tokens whose logits exist at one time."""
    kernels: frozenset[str] = frozenset({"norm", "rotary", "swiglu"})
    """Which Triton kernels may be used where they can run."""


class RotaryTable:
    """Cos and sin of every position, made once by the model's own rotary module (so every kind of scaling is the model's)."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._table: Tensor | None = None

    def get(self, longest_position: int, device: torch.device) -> Tensor:
        """(2, positions, dim) in fp32 for positions 0 … longest_position at least."""
        if self._table is None or self._table.shape[1] <= longest_position or self._table.device != device:
            known = 0 if self._table is None else self._table.shape[1]
            # Never longer than needed beyond what the model was made for: dynamic scaling would change every position.
            limit = int(getattr(self._decoder.config, "max_position_embeddings", 256))
            count = max(longest_position + 1, min(max(2 * known, 256), limit))
            with torch.no_grad():
                positions = torch.arange(count, device=device)[None]
                cos, sin = self._decoder.rotary(torch.zeros(1, dtype=torch.float32, device=device), positions)
            self._table = torch.stack([cos[0], sin[0]]).float().contiguous()
        return self._table


class FastPass:
    """Runs passes of one model."""

    def __init__(self, decoder: Decoder, options: PassOptions) -> None:
        self.decoder = decoder
        self.options = options
        self._table = RotaryTable(decoder)

    def __call__(self, batch: Pass, seed: int, *, training: bool = True) -> Tensor:
        """The mean loss of each micro-batch, (micro_batches) in fp32. `seed` decides the dropout masks."""
        decoder, options = self.decoder, self.options
        device = batch.input_ids.device
        for group in decoder.groups:
            group.refresh(options.dtype)
        blocks = -(-batch.targets.shape[0] // options.block_tokens)
        draws = _draw(decoder, blocks, seed, device, training=training)
        table = self._table.get(batch.longest_position, device)
        with torch.autocast(device.type, enabled=False):
            # Not through the module: a hook there (for checkpointing) would ask for a gradient that nothing needs.
            hidden = functional.embedding(batch.input_ids, decoder.embedding.get_parameter("weight"))
            delta: Tensor | None = None
            for number, layer in enumerate(decoder.layers):
                arguments = (hidden, delta, layer, batch, table, draws)
                if number < options.recomputed_layers:
                    hidden = checkpoint(
                        self._layer_sum,
                        *arguments,
                        use_reentrant=False,
                        preserve_rng_state=False,
                        determinism_check="none",
                    )
                    delta = None
                else:
                    hidden, delta = self._layer(*arguments)
            _, normed = self._add_norm(hidden, delta, decoder.norm)
            losses: Tensor = head_loss.HeadLoss.apply(
                normed, decoder.head, draws[decoder.head.number], batch.rows, batch.targets, batch.owners, batch.shares,
                batch.micro_batches, options.block_tokens, *decoder.head.parameters,
            )  # fmt: skip
        return losses

    def _layer_sum(
        self, hidden: Tensor, delta: Tensor | None, layer: Layer, batch: Pass, table: Tensor, draws: "Draws"
    ) -> Tensor:
        total, rest = self._layer(hidden, delta, layer, batch, table, draws)
        return total + rest

    def _layer(
        self, hidden: Tensor, delta: Tensor | None, layer: Layer, batch: Pass, table: Tensor, draws: "Draws"
    ) -> tuple[Tensor, Tensor]:
        hidden, normed = self._add_norm(hidden, delta, layer.attention_norm)
        stacked = _linear(normed, layer.projection, draws)
        attended = attend(*self._split_and_turn(stacked, table, batch.positions), batch.segments)
        hidden, normed = self._add_norm(hidden, _linear(attended, layer.output, draws), layer.mlp_norm)
        return hidden, self._mlp(_linear(normed, layer.gate_up, draws), layer, draws)

    def _mlp(self, stacked: Tensor, layer: Layer, draws: "Draws") -> Tensor:
        if "swiglu" in self.options.kernels and uses_kernels(stacked):
            down: Tensor = SwigluLinear.apply(stacked, layer.down, draws[layer.down.number][0], *layer.down.parameters)
            return down
        gate, up = stacked.chunk(2, dim=-1)
        return _linear(functional.silu(gate) * up, layer.down, draws)

    def _add_norm(self, hidden: Tensor, delta: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        if "norm" in self.options.kernels and uses_kernels(hidden):
            from core.xtuner.runtime.speed.kernels.norm import AddNorm

            total, normed = AddNorm.apply(hidden, delta, norm.weight, norm.eps, self.options.dtype)
            return total, normed
        total = hidden if delta is None else hidden + delta
        wide = total if total.dtype == torch.float64 else total.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return total, (wide * norm.weight).to(self.options.dtype)

    def _split_and_turn(self, stacked: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, dim = self.decoder.heads, self.decoder.kv_heads, self.decoder.dim
        if "rotary" in self.options.kernels and uses_kernels(stacked):
            from core.xtuner.runtime.speed.kernels.rotary import SplitAndTurn

            query, key, value = SplitAndTurn.apply(stacked, table, positions, heads, kv_heads, self.decoder.interleaved)
            return query, key, value
        if self.decoder.interleaved:
            parts = stacked.view(-1, kv_heads, heads // kv_heads + 2, dim)
            query, key, value = parts[:, :, :-2].reshape(-1, heads, dim), parts[:, :, -2], parts[:, :, -1]
        else:
            query, key, value = stacked.view(-1, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
        cos, sin = table[:, positions, None]
        return _turn(query, cos, sin), _turn(key, cos, sin), value


Draws = dict[int, list[Draw]]


def _linear(x: Tensor, group: LinearGroup, draws: Draws) -> Tensor:
    y: Tensor = AdaptedLinear.apply(x, group, draws[group.number][0], *group.parameters)
    return y


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _draw(decoder: Decoder, head_blocks: int, seed: int, device: torch.device, *, training: bool) -> Draws:
    """Seeds for every adapter in the pass (one for each block of the head), moved to the device in one copy."""
    counts = [(group, max(1, head_blocks) if group is decoder.head else 1) for group in decoder.groups]
    total = sum(group.count * times for group, times in counts)
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(1, _SEED_LIMIT, (total,), generator=generator)
    moved = seeds.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else seeds
    host = seeds.tolist()
    draws: Draws = {}
    offset = 0
    for group, times in counts:
        draws[group.number] = []
        for _ in range(times):
            span = slice(offset, offset + group.count)
            draws[group.number].append(Draw(group.dropout(training=training), tuple(host[span]), moved[span]))
            offset += group.count
    return draws
