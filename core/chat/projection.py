"""A decoder's matrices in the layout that this machine multiplies soonest, and as int8 on request. Knows no model.

On a CPU one token costs what it costs to read the weights once, so half the bytes are almost twice the speed.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch.nn.functional import linear

from core.chat.adapter import LowRank

_INT8_MOST: Final = 127
_SMALLEST_SCALE: Final = 1e-12
"""Of a row of zeros."""
_ROWS_AT_A_TIME: Final = 4096
_FEW_ROWS: Final = 8
"""Up to so many rows are multiplied in int8; a prompt's many rows go faster through bfloat16, made anew each time."""

Layout = Literal["plain", "packed", "int8"]


@dataclass(frozen=True, slots=True)
class Projection:
    """One or several linear layers with the same input, as one multiplication."""

    weight: torch.Tensor
    """(out, in); packed: in oneDNN's own layout"""
    bias: torch.Tensor | None
    low_rank: LowRank | None
    layout: Layout = "plain"
    scales: torch.Tensor | None = None
    """int8: (out,) what each row of `weight` is to be multiplied by"""
    rounding_error: float = 0.0
    """int8: see `quantise`"""

    def apply(self, x: torch.Tensor, tuned: torch.Tensor | None) -> torch.Tensor:
        """`tuned` (rows, 1, 1), or (rows, 1) where `x` is (rows, in): 1 for rows that want the adapter, 0 for the base model;
        None: base for all."""
        if self.layout == "packed":
            y = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        elif self.scales is not None:
            y = self._int8(x, self.scales)
        else:
            y = linear(x, self.weight, self.bias)
        if self.low_rank is None or tuned is None:
            return y
        return y + linear(linear(x, self.low_rank.a) * tuned, self.low_rank.b)

    def _int8(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, x.shape[-1])
        if rows.shape[0] <= _FEW_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, scales)
        else:
            y = linear(rows, self.weight.to(x.dtype)).mul_(scales)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def make_projection(
    weight: torch.Tensor, bias: torch.Tensor | None, low_rank: LowRank | None, layout: Layout | None = None
) -> Projection:
    """`weight` (out, in) in `layout`; None: packed where this machine multiplies that soonest, else plain. int8: one scale a row
    (CPU, bfloat16)."""
    if layout == "int8":
        rounded, scales, error = quantise(weight)
        return Projection(rounded, bias, low_rank, "int8", scales, error)
    if layout == "packed" or (layout is None and can_pack(weight.dtype, weight.device)):
        return Projection(torch.ops.mkldnn._reorder_linear_weight(weight, 1), bias, low_rank, "packed")
    return Projection(weight, bias, low_rank)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`weight` (out, in) as int8, (out,) scales of its dtype, and the relative error: |changed| / |weight|, Frobenius.

    Symmetric, the largest of a row becomes 127; some rows at a time, so that it needs little memory.
    """
    rounded = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty_like(weight[:, 0])
    lost = whole = 0.0
    for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        wide = weight[rows].float()
        # The scale is rounded to its dtype first: what is rounded must fit the scale that is used.
        scales[rows] = (wide.abs().amax(dim=1) / _INT8_MOST).clamp_(min=_SMALLEST_SCALE)
        scale = scales[rows].float()[:, None]
        rounded[rows] = (wide / scale).round_().clamp_(-_INT8_MOST, _INT8_MOST)
        lost += float((wide - rounded[rows] * scale).square_().sum())
        whole += float(wide.square().sum())
    return rounded, scales, (lost / whole) ** 0.5 if whole else 0.0


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies `dtype` soonest here: then weights are laid out for it once, bfloat16 at half of float32's bytes."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:  # measured on x86 only: half of the time of a plain matrix
        return str(torch.backends.cpu.get_cpu_capability()).startswith("AVX")
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
