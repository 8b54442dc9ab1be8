"""Linear layers that read the same input, stacked, with their adapters: one product for the frozen weights, small ones for the adapters.

Knows LoRA's arithmetic (Hu et al. 2021, arXiv 2106.09685), not where the layers come from (`anatomy` does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from core.xtuner.runtime.speed import dropout
from core.xtuner.runtime.speed.backend import uses_kernels
from core.xtuner.runtime.speed.weights import FrozenWeight

_HAS_WIDE_PRODUCT: Final = hasattr(torch.ops.aten.mm, "dtype")
"""torch >= 2.8: 16-bit operands, fp32 result."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA pair: y += scale · B(A(dropout(x)))."""

    a: nn.Parameter
    """(rank, in)"""
    b: nn.Parameter
    """(out, rank)"""
    scale: float
    dropout: float


class LinearGroup:
    """Projections of one input. Holds compute-dtype copies of the adapters' weights, renewed by `refresh` before each pass."""

    def __init__(self, weight: FrozenWeight, adapters: Sequence[Adapter | None], number: int) -> None:
        self.weight = weight
        self.number = number
        self.adapters = [
            (adapter, start, stop)
            for adapter, (start, stop) in zip(adapters, weight.spans, strict=True)
            if adapter is not None
        ]
        ranks = {adapter.a.shape[0] for adapter, _, _ in self.adapters}
        if len(ranks) > 1 or len({adapter.dropout for adapter, _, _ in self.adapters}) > 1:
            raise ValueError("adapters of one input must share rank and dropout")
        self.rank = ranks.pop() if ranks else 0
        self.count = len(self.adapters)
        self.a: Tensor | None = None
        self.b: list[Tensor] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter, _, _ in self.adapters for parameter in (adapter.a, adapter.b)]

    def dropout(self, *, training: bool) -> float:
        return self.adapters[0][0].dropout if self.adapters and training else 0.0

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Copy the adapters' weights (fp32 masters, as a rule) into the dtype of the arithmetic."""
        if not self.adapters:
            return
        first = self.adapters[0][0].a
        if self.a is None or self.a.dtype != dtype or self.a.device != first.device:
            self.a = torch.empty(self.count * self.rank, first.shape[1], dtype=dtype, device=first.device)
            self.b = [torch.empty_like(adapter.b, dtype=dtype) for adapter, _, _ in self.adapters]
        for index, (adapter, _, _) in enumerate(self.adapters):
            self.a[index * self.rank : (index + 1) * self.rank].copy_(adapter.a)
            self.b[index].copy_(adapter.b)


@dataclass(frozen=True, slots=True)
class Draw:
    """The dropout of one group in one pass: its probability and one seed for each adapter, on the host and on the device."""

    probability: float
    seeds: tuple[int, ...]
    device_seeds: Tensor | None


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right with an fp32 result, also from 16-bit operands where the device can give one."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16) and _HAS_WIDE_PRODUCT:
        return torch.mm(left, right, out_dtype=torch.float32)
    result = torch.mm(left, right)
    return result if result.dtype == torch.float64 else result.float()


def forward(x: Tensor, group: LinearGroup, draw: Draw) -> tuple[Tensor, Tensor | None]:
    """(tokens, in) → (tokens, out of all projections), and A·dropout(x) (tokens, count·rank), which `backward` needs."""
    weight = group.weight.dense(x.dtype)
    bias = group.weight.bias(x.dtype)
    y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    del weight
    if group.a is None:
        return y, None
    down = _down(x, group.a, group.count, draw)
    for index, (adapter, start, stop) in enumerate(group.adapters):
        part = down[:, index * group.rank : (index + 1) * group.rank]
        y[:, start:stop].addmm_(part, group.b[index].T, alpha=adapter.scale)
    return y, down


def backward(
    d_y: Tensor, x: Tensor, down: Tensor | None, group: LinearGroup, draw: Draw, *, needs_input: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of x (None if not needed) and of each adapter's A and B in turn, in fp32."""
    d_x: Tensor | None = None
    if needs_input:
        d_x = torch.mm(d_y, group.weight.dense(d_y.dtype))
    if group.a is None or down is None:
        return d_x, []
    d_down = torch.empty_like(down)
    d_bs: list[Tensor] = []
    for index, (adapter, start, stop) in enumerate(group.adapters):
        span = slice(index * group.rank, (index + 1) * group.rank)
        torch.addmm(
            d_down[:, span], d_y[:, start:stop], group.b[index], beta=0.0, alpha=adapter.scale, out=d_down[:, span]
        )
        d_bs.append(product(d_y[:, start:stop].T, down[:, span]).mul_(adapter.scale))
    d_a = _weight_gradient(x, d_down, group.count, draw)
    if d_x is not None:
        _add_up(d_x, d_down, group.a, group.count, draw)
    gradients: list[Tensor] = []
    for index, d_b in enumerate(d_bs):
        gradients += [d_a[index * group.rank : (index + 1) * group.rank], d_b]
    return d_x, gradients


def _down(x: Tensor, a: Tensor, count: int, draw: Draw) -> Tensor:
    if draw.probability == 0.0:
        return torch.mm(x, a.T)
    if uses_kernels(x) and draw.device_seeds is not None:
        from core.xtuner.runtime.speed.kernels import adapter

        keep_scale = 1.0 / (1.0 - draw.probability)
        return adapter.down(x, a, count, draw.device_seeds, dropout.threshold(draw.probability), keep_scale)
    rank = a.shape[0] // count
    parts = [
        torch.mm(dropout.dropped(x, draw.seeds[i], draw.probability), a[i * rank : (i + 1) * rank].T)
        for i in range(count)
    ]
    return torch.cat(parts, dim=1)


def _weight_gradient(x: Tensor, d_down: Tensor, count: int, draw: Draw) -> Tensor:
    if draw.probability == 0.0:
        return product(d_down.T, x)
    if uses_kernels(x) and draw.device_seeds is not None:
        from core.xtuner.runtime.speed.kernels import adapter

        keep_scale = 1.0 / (1.0 - draw.probability)
        return adapter.weight_gradient(
            x, d_down, count, draw.device_seeds, dropout.threshold(draw.probability), keep_scale
        )
    rank = d_down.shape[1] // count
    parts = [
        product(d_down[:, i * rank : (i + 1) * rank].T, dropout.dropped(x, draw.seeds[i], draw.probability))
        for i in range(count)
    ]
    return torch.cat(parts)


def _add_up(d_x: Tensor, d_down: Tensor, a: Tensor, count: int, draw: Draw) -> None:
    if draw.probability == 0.0:
        d_x.addmm_(d_down, a)
        return
    keep_scale = 1.0 / (1.0 - draw.probability)
    if uses_kernels(d_x) and draw.device_seeds is not None:
        from core.xtuner.runtime.speed.kernels import adapter

        adapter.add_up(d_x, d_down, a, count, draw.device_seeds, dropout.threshold(draw.probability), keep_scale)
        return
    rank = a.shape[0] // count
    for i in range(count):
        mask = dropout.keep_mask(d_x.shape[0], d_x.shape[1], draw.seeds[i], draw.probability, d_x.device)
        span = slice(i * rank, (i + 1) * rank)
        d_x.add_(torch.where(mask, torch.mm(d_down[:, span], a[span]) * keep_scale, 0.0))


class AdaptedLinear(torch.autograd.Function):
    """`forward` above as a differentiable function of x and the adapters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup, draw: Draw, *parameters: Tensor) -> Tensor:
        y, down = forward(x, group, draw)
        ctx.save_for_backward(x, *([] if down is None else [down]))
        ctx.group, ctx.draw = group, draw
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        d_x, adapters = backward(
            gradients[0].contiguous(), x, rest[0] if rest else None, ctx.group, ctx.draw,
            needs_input=ctx.needs_input_grad[0],
        )  # fmt: skip
        cast = [gradient.to(dtype) for gradient, dtype in zip(adapters, ctx.dtypes, strict=True)]
        return (d_x, None, None, *cast)


class SwigluLinear(torch.autograd.Function):
    """The down projection of silu(gate) · up. Keeps the stacked gate and up only; the activation is made again on the way back."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, group: LinearGroup, draw: Draw, *parameters: Tensor) -> Tensor:
        from core.xtuner.runtime.speed.kernels.swiglu import swiglu

        y, down = forward(swiglu(stacked), group, draw)
        ctx.save_for_backward(stacked, *([] if down is None else [down]))
        ctx.group, ctx.draw = group, draw
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        from core.xtuner.runtime.speed.kernels.swiglu import swiglu, swiglu_backward

        stacked, *rest = ctx.saved_tensors
        activation, adapters = backward(
            gradients[0].contiguous(), swiglu(stacked), rest[0] if rest else None, ctx.group, ctx.draw
        )
        assert activation is not None
        cast = [gradient.to(dtype) for gradient, dtype in zip(adapters, ctx.dtypes, strict=True)]
        return (swiglu_backward(stacked, activation), None, None, *cast)
