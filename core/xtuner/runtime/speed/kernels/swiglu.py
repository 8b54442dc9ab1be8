"""SwiGLU on a stacked gate and up projection, as Triton kernels; the backward pass makes the activation again instead of keeping it."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK: Final = 1024


@triton.jit
def _forward(stacked, out, width, BLOCK: tl.constexpr):  # pragma: no cover - compiled
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(stacked + row * 2 * width + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(stacked + row * 2 * width + width + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + cols, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(stacked, d_out, d_stacked, width, BLOCK: tl.constexpr):  # pragma: no cover - compiled
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(stacked + row * 2 * width + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(stacked + row * 2 * width + width + cols, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(d_out + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
    target = d_stacked + row * 2 * width + cols
    tl.store(target, d_gate.to(d_stacked.dtype.element_ty), mask=inside)
    tl.store(target + width, (gradient * silu).to(d_stacked.dtype.element_ty), mask=inside)


def swiglu(stacked: Tensor) -> Tensor:
    """silu(gate) · up in fp32 of stacked (tokens, 2·width), contiguous → (tokens, width)."""
    tokens, width = stacked.shape[0], stacked.shape[1] // 2
    out = stacked.new_empty(tokens, width)
    _forward[(tokens, triton.cdiv(width, _BLOCK))](stacked, out, width, BLOCK=_BLOCK)
    return out


def swiglu_backward(stacked: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of `stacked` for the gradient of `swiglu(stacked)`."""
    tokens, width = stacked.shape[0], stacked.shape[1] // 2
    d_stacked = torch.empty_like(stacked)
    _backward[(tokens, triton.cdiv(width, _BLOCK))](stacked, gradient.contiguous(), d_stacked, width, BLOCK=_BLOCK)
    return d_stacked
