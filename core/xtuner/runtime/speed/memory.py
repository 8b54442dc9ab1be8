"""How much of a pass fits on the device: what a layer keeps for its backward pass, and how many layers must be computed again."""

from dataclasses import dataclass
from typing import Final

import psutil
import torch

from core.xtuner.runtime.speed.anatomy import Decoder

_RESERVE: Final = 0.08
"""Share of the budget left for fragments and kernels' workspaces."""
_CHUNK_COPIES: Final = 3
"""Blocks of logits alive at one time: the logits, and a product's workspace and output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    tokens: int
    recomputed_layers: int
    block_tokens: int
    expected_bytes: int


def bytes_per_token(decoder: Decoder, dtype: torch.dtype) -> tuple[int, int]:
    """What one layer keeps for a token: computed once, and computed again (then only the residual stream is kept)."""
    item, residual = dtype.itemsize, decoder.embedding.get_parameter("weight").dtype.itemsize
    hidden = decoder.config.hidden_size
    heads = (decoder.heads + 2 * decoder.kv_heads) * decoder.dim
    attended = decoder.heads * decoder.dim
    width = decoder.layers[0].gate_up.weight.spans[-1][1]
    ranks = sum(group.count * group.rank for group in decoder.layers[0].groups)
    kept = 2 * hidden * (residual + item) + item * (heads + attended + width + ranks) + 4 * decoder.heads
    return kept, hidden * residual


def plan(
    decoder: Decoder, dtype: torch.dtype, tokens: int, free_bytes: int, *, fewest_recomputed: int = 0
) -> MemoryPlan | None:
    """The plan for passes of `tokens` within `free_bytes` beyond what is allocated now, or None if it cannot fit."""
    kept, recomputed = bytes_per_token(decoder, dtype)
    layers = len(decoder.layers)
    budget = int(free_bytes * (1.0 - _RESERVE))
    vocabulary = decoder.head.weight.spans[-1][1]
    hidden = decoder.config.hidden_size
    width = decoder.layers[0].gate_up.weight.spans[-1][1]
    # Adapters: gradients and two Adam moments in fp32, and the copies in the dtype of the arithmetic.
    trained = sum(parameter.numel() for parameter in decoder.parameters) * (12 + dtype.itemsize)
    unpacked = max(
        (group.weight.elements * dtype.itemsize for group in decoder.groups if group.weight.packed), default=0
    )
    in_backward = tokens * dtype.itemsize * (2 * width + 6 * hidden) + 2 * unpacked
    for block in (4096, 2048, 1024, 512):
        logits = _CHUNK_COPIES * min(block, tokens) * vocabulary * dtype.itemsize
        fixed = trained + max(in_backward, logits) + tokens * hidden * 3 * dtype.itemsize
        for count in range(fewest_recomputed, layers + 1):
            again = kept * tokens if count else 0
            need = fixed + tokens * (kept * (layers - count) + recomputed * count) + again
            if need <= budget and (count == fewest_recomputed or block <= 1024 or need + logits <= budget):
                return MemoryPlan(tokens=tokens, recomputed_layers=count, block_tokens=block, expected_bytes=need)
    return None


def free_bytes(device: torch.device, limit_bytes: int | None) -> int:
    """What may still be allocated on the device, counting memory that torch holds but does not use."""
    if device.type != "cuda":
        available = int(psutil.virtual_memory().available)
        return available if limit_bytes is None else min(available, limit_bytes)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int = torch.cuda.mem_get_info(device)[0] + unused
    if limit_bytes is not None:
        free = min(free, limit_bytes - torch.cuda.memory_allocated(device))
    return max(0, free)
