"""RMSNorm fused with the residual addition before it, as Triton kernels. Knows nothing of models."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    x, delta, weight, total, normed, rstd_out, columns, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):  # pragma: no cover - compiled
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < columns
    value = tl.load(x + row * columns + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row * columns + cols, mask=inside, other=0.0).to(tl.float32)
        # What the next addition reads is the rounded sum, so the norm must see it too.
        value = value.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + row * columns + cols, value.to(total.dtype.element_ty), mask=inside)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / columns + eps)
    scale = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * columns + cols, (value * rstd * scale).to(normed.dtype.element_ty), mask=inside)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _backward(
    d_normed, d_total, total, weight, rstd_in, d_x, d_delta, columns,
    HAS_TOTAL: tl.constexpr, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < columns
    value = tl.load(total + row * columns + cols, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_in + row)
    gradient = tl.load(d_normed + row * columns + cols, mask=inside, other=0.0).to(tl.float32) * scale
    normalised = value * rstd
    projection = tl.sum(gradient * normalised, axis=0) / columns
    result = (gradient - normalised * projection) * rstd
    if HAS_TOTAL:
        result += tl.load(d_total + row * columns + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_x + row * columns + cols, result.to(d_x.dtype.element_ty), mask=inside)
    if HAS_DELTA:
        tl.store(d_delta + row * columns + cols, result.to(d_delta.dtype.element_ty), mask=inside)


def _launch(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class AddNorm(torch.autograd.Function):
    """`total = x + delta`, `normed = rms_norm(total) · weight`; x and total keep the residual's dtype.

    x, delta: (tokens, hidden), weight: (hidden), frozen. Formula: Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape
        total = torch.empty_like(x) if delta is not None else x
        normed = torch.empty(rows, columns, dtype=dtype, device=x.device)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        _forward[(rows,)](
            x, x if delta is None else delta, weight, total, normed, rstd, columns, eps,
            HAS_DELTA=delta is not None, **_launch(columns),
        )  # fmt: skip
        ctx.save_for_backward(total, weight, rstd)
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.set_materialize_grads(False)
        return (total if delta is not None else x.view_as(x)), normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_total, d_normed = gradients
        total, weight, rstd = ctx.saved_tensors
        if d_normed is None:
            d_delta = d_total if d_total is None or ctx.delta_dtype is None else d_total.to(ctx.delta_dtype)
            return d_total, d_delta, None, None, None
        rows, columns = total.shape
        d_x = torch.empty_like(total)
        has_delta = ctx.delta_dtype is not None
        d_delta = torch.empty(rows, columns, dtype=ctx.delta_dtype, device=total.device) if has_delta else None
        _backward[(rows,)](
            d_normed.contiguous(), d_normed if d_total is None else d_total.contiguous(), total, weight, rstd,
            d_x, d_x if d_delta is None else d_delta, columns,
            HAS_TOTAL=d_total is not None, HAS_DELTA=has_delta, **_launch(columns),
        )  # fmt: skip
        return d_x, d_delta, None, None, None
