"""Dropout as a pure function of (seed, position): the same mask in the forward pass, the backward pass and a recomputation."""

from typing import Final

import torch
from torch import Tensor

_BITS: Final = 24
_MASK32: Final = 0xFFFFFFFF


def threshold(probability: float) -> int:
    """The hash (24 bits) below which an element is dropped."""
    return round(probability * 2**_BITS)


def keep_mask(tokens: int, columns: int, seed: int, probability: float, device: torch.device) -> Tensor:
    """Bool (tokens, columns), True where the element stays. The hash is the one of `kernels.adapter._keep`.

    Multiply-xorshift mixing of a counter, 32 bits; constants found by the hash-prospector search (public domain).
    """
    index = torch.arange(tokens * columns, dtype=torch.int64, device=device)
    x = (index & _MASK32) ^ seed
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK32
    x = x ^ (x >> 15)
    x = (x + seed) & _MASK32
    x = (x * 0x735A2D97) & _MASK32
    x = x ^ (x >> 15)
    return ((x >> 8) >= threshold(probability)).view(tokens, columns)


def dropped(x: Tensor, seed: int, probability: float) -> Tensor:
    """x with dropout applied and the rest scaled by 1 / (1 − p)."""
    mask = keep_mask(x.shape[0], x.shape[1], seed, probability, x.device)
    return torch.where(mask, x, 0.0) / (1.0 - probability)
