"""Causal attention inside each segment of a packed sequence. A token never sees another segment."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the samples of a pass begin and end, known on the host so that no kernel waits for it."""

    lengths: Sequence[int]
    bounds: Tensor
    """Running sum of the lengths from 0, int32, on the device."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=bounds[1:])
        return cls(tuple(lengths), _to(bounds, device))


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def has_varlen_flash(query: Tensor) -> bool:
    """Whether torch's own variable-length flash kernel takes these heads (NVIDIA from compute capability 8.0, 16 bits)."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and hasattr(torch.ops.aten, "_flash_attention_forward")
    )


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """query (tokens, heads, dim), key and value (tokens, kv_heads, dim) → (tokens, heads·dim)."""
    scale = 1.0 / math.sqrt(query.shape[-1])
    if has_varlen_flash(query):
        longest = max(segments.lengths)
        out = torch.ops.aten._flash_attention_forward(
            query, key, value, segments.bounds, segments.bounds, longest, longest, 0.0, True, False, scale=scale
        )[0]
        return out.reshape(query.shape[0], -1)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = [
        functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, scale=scale
        )[0].transpose(0, 1)
        for q, k, v in zip(
            query.split(segments.lengths), key.split(segments.lengths), value.split(segments.lengths), strict=True
        )
    ]
    return torch.cat(parts).reshape(query.shape[0], -1)
