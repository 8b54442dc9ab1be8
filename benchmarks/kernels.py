"""Each Triton kernel, the varlen attention and the fused loss against their formulas in fp64: relative errors by type of number.

The reference sees the same rounded inputs, so an error is what the computation adds: at most a few units in the last place.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.result import NoGpu, Result

LIMITS: Final = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
"""On ‖got − reference‖ / ‖reference‖: half a unit in the last place is 6e-8, 4.9e-4 and 3.9e-3."""


@dataclass(frozen=True, slots=True)
class Sizes:
    tokens: int = 1000
    hidden: int = 2048
    width: int = 8192
    vocabulary: int = 92544
    heads: int = 16
    kv_heads: int = 8
    dim: int = 128
    rank: int = 64


def run() -> Result:
    """Raises NoGpu without a GPU."""
    if not torch.cuda.is_available():
        raise NoGpu("needs an NVIDIA GPU")
    figures: dict[str, float | int | str | None] = {"gpu": torch.cuda.get_device_name()}
    targets: dict[str, tuple[str, float]] = {}
    for dtype, limit in LIMITS.items():
        errors = measure(dtype, torch.device("cuda"), Sizes())
        name = str(dtype).removeprefix("torch.")
        figures |= {f"{key}_{name}": error for key, error in errors.items()}
        figures[f"worst_{name}"] = max(errors.values())
        targets[f"worst_{name}"] = ("<", limit)
    return Result(figures, targets)


def measure(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Relative error of each kernel's results and gradients, on random inputs."""
    found: dict[str, float] = {}
    for check in (_norm, _rotary, _swiglu, _cross_entropy, _adapter, _attention, _linear):
        torch.manual_seed(3)
        for name, got, wanted in check(dtype, device, sizes):
            difference = (got.double() - wanted).norm() / wanted.norm()
            found[name] = float(f"{float(difference):.3g}")
    return found


Compared = Iterator[tuple[str, Tensor, Tensor]]


def _random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def _gradients(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, gradient))


def _norm(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Compared:
    from core.xtuner.runtime.speed.kernels.norm import AddNorm

    x, delta, gradient = (_random(sizes.tokens, sizes.hidden, dtype=dtype, device=device) for _ in range(3))
    weight = _random(sizes.hidden, dtype=dtype, device=device)

    def fused(a: Tensor, b: Tensor) -> Tensor:
        total, normed = AddNorm.apply(a, b, weight, 1e-5, dtype)
        return torch.cat([total, normed])

    def plain(a: Tensor, b: Tensor) -> Tensor:
        # The kernel rounds the sum before it takes the norm, for the next layer reads the rounded one.
        total = a + b
        total = total + (total.to(dtype).double() - total).detach()
        return torch.cat([total, total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight.double()])

    both = torch.cat([gradient, gradient.flip(0)])
    yield "norm", fused(x, delta), plain(x.double(), delta.double())
    wanted = _gradients(plain, [x.double(), delta.double()], both.double())
    for name, got, right in zip(("x", "delta"), _gradients(fused, [x, delta], both), wanted, strict=True):
        yield f"norm_d_{name}", got, right


def _rotary(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Compared:
    from core.xtuner.runtime.speed.kernels.rotary import SplitAndTurn

    positions = torch.randint(0, 500, (sizes.tokens,), device=device)
    angles = torch.arange(500, device=device)[:, None] / 10000 ** (
        torch.arange(0, sizes.dim, 2, device=device) / sizes.dim
    )
    table = torch.stack([torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()]).float()
    columns = (sizes.heads + 2 * sizes.kv_heads) * sizes.dim
    stacked, gradient = (_random(sizes.tokens, columns, dtype=dtype, device=device) for _ in range(2))
    for is_interleaved in (False, True):

        def fused(x: Tensor, layout: bool = is_interleaved) -> Tensor:
            parts = SplitAndTurn.apply(x, table, positions, sizes.heads, sizes.kv_heads, layout)
            return torch.cat([part.flatten(1) for part in parts], dim=1)

        def plain(x: Tensor, layout: bool = is_interleaved) -> Tensor:
            return _turned(x, table.double(), positions, sizes, layout)

        name = "rotary_interleaved" if is_interleaved else "rotary"
        yield name, fused(stacked), plain(stacked.double())
        (got,), (wanted,) = (
            _gradients(fused, [stacked], gradient),
            _gradients(plain, [stacked.double()], gradient.double()),
        )
        yield f"{name}_d_x", got, wanted


def _turned(x: Tensor, table: Tensor, positions: Tensor, sizes: Sizes, is_interleaved: bool) -> Tensor:
    groups = sizes.heads // sizes.kv_heads
    if is_interleaved:
        parts = x.view(-1, sizes.kv_heads, groups + 2, sizes.dim)
        query, key, value = parts[:, :, :-2].flatten(1, 2), parts[:, :, -2], parts[:, :, -1]
    else:
        split = [sizes.heads, sizes.kv_heads, sizes.kv_heads]
        query, key, value = x.view(-1, sum(split), sizes.dim).split(split, dim=1)
    cos, sin = table[:, positions, None]

    def turn(part: Tensor) -> Tensor:
        first, second = part.chunk(2, -1)
        return part * cos + torch.cat([-second, first], -1) * sin

    return torch.cat([turn(query).flatten(1), turn(key).flatten(1), value.flatten(1)], dim=1)


def _swiglu(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Compared:
    from core.xtuner.runtime.speed.kernels.swiglu import swiglu, swiglu_backward

    stacked = _random(sizes.tokens, 2 * sizes.width, dtype=dtype, device=device)
    gradient = _random(sizes.tokens, sizes.width, dtype=dtype, device=device)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    yield "swiglu", swiglu(stacked), plain(stacked.double())
    yield (
        "swiglu_d_x",
        swiglu_backward(stacked, gradient),
        _gradients(plain, [stacked.double()], gradient.double())[0],
    )


def _cross_entropy(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Compared:
    from core.xtuner.runtime.speed.kernels.cross_entropy import cross_entropy_in_place

    rows = min(sizes.tokens, 256)
    logits = _random(rows, sizes.vocabulary, dtype=dtype, device=device, scale=2.0)
    targets = torch.randint(0, sizes.vocabulary, (rows,), device=device)
    weights = torch.rand(rows, device=device)
    wide = logits.double().requires_grad_()
    wanted = functional.cross_entropy(wide, targets, reduction="none")
    (d_logits,) = torch.autograd.grad((wanted * weights).sum(), wide)
    losses = cross_entropy_in_place(logits, targets, weights)
    yield "cross_entropy", losses, wanted.detach()
    yield "cross_entropy_d_logits", logits, d_logits


def _adapter(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Compared:
    """The three products with dropout, for two adapters on one input."""
    from core.xtuner.runtime.speed import dropout
    from core.xtuner.runtime.speed.kernels import adapter

    probability, seeds = 0.1, (12345, 987654)
    x = _random(sizes.tokens, sizes.hidden, dtype=dtype, device=device)
    a = _random(2 * sizes.rank, sizes.hidden, dtype=dtype, device=device, scale=0.02)
    d_down = _random(sizes.tokens, 2 * sizes.rank, dtype=dtype, device=device)
    d_x = _random(sizes.tokens, sizes.hidden, dtype=dtype, device=device)
    masks = [dropout.keep_mask(sizes.tokens, sizes.hidden, seed, probability, device) for seed in seeds]
    dropped = [x.double() * mask / (1 - probability) for mask in masks]
    spans = [slice(0, sizes.rank), slice(sizes.rank, 2 * sizes.rank)]
    common = (2, torch.tensor(seeds, device=device), dropout.threshold(probability), 1 / (1 - probability))
    pairs = list(zip(dropped, spans, strict=True))
    yield "adapter_down", adapter.down(x, a, *common), torch.cat([part @ a[span].double().T for part, span in pairs], 1)
    yield (
        "adapter_d_a",
        adapter.weight_gradient(x, d_down, *common),
        torch.cat([d_down[:, span].double().T @ part for part, span in pairs]),
    )
    wanted = d_x.double()
    for mask, span in zip(masks, spans, strict=True):
        wanted = wanted + (d_down[:, span].double() @ a[span].double()) * mask / (1 - probability)
    adapter.add_up(d_x, d_down, a, *common)
    yield "adapter_d_x", d_x, wanted


def _attention(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Compared:
    from core.xtuner.runtime.speed.attention import Segments, attend

    lengths = [sizes.tokens // 2, sizes.tokens // 3, sizes.tokens - sizes.tokens // 2 - sizes.tokens // 3]
    inputs = [
        _random(sizes.tokens, heads, sizes.dim, dtype=dtype, device=device)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    ]
    gradient = _random(sizes.tokens, sizes.heads * sizes.dim, dtype=dtype, device=device)
    segments = Segments.of(lengths, device)
    owner = torch.repeat_interleave(torch.arange(3, device=device), torch.tensor(lengths, device=device))
    order = torch.arange(sizes.tokens, device=device)
    mask = (owner[:, None] == owner[None]) & (order[:, None] >= order[None])

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = sizes.heads // sizes.kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(sizes.dim)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, segments)

    wide = [tensor.double() for tensor in inputs]
    yield "attention", fused(*inputs), plain(*wide)
    wanted = _gradients(plain, wide, gradient.double())
    for name, got, right in zip(("query", "key", "value"), _gradients(fused, inputs, gradient), wanted, strict=True):
        yield f"attention_d_{name}", got, right


def _linear(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Compared:
    """A whole LoRA layer, without dropout: rounding of its inner products included."""
    from core.xtuner.runtime.speed.linear import AdaptedLinear, Adapter, Draw, LinearGroup
    from core.xtuner.runtime.speed.weights import FrozenWeight

    base = nn.Linear(sizes.hidden, sizes.width, bias=False, device=device, dtype=dtype)
    a = nn.Parameter(
        _random(sizes.rank, sizes.hidden, dtype=torch.float32, device=device, scale=0.02).to(dtype).float()
    )
    b = nn.Parameter(_random(sizes.width, sizes.rank, dtype=torch.float32, device=device, scale=0.02).to(dtype).float())
    group = LinearGroup(FrozenWeight([base]), [Adapter(a, b, 0.25, 0.0)], 0)
    group.refresh(dtype)
    x = _random(sizes.tokens, sizes.hidden, dtype=dtype, device=device)
    gradient = _random(sizes.tokens, sizes.width, dtype=dtype, device=device)

    def fused(value: Tensor, *adapters: Tensor) -> Tensor:
        y: Tensor = AdaptedLinear.apply(value, group, Draw(0.0, (), None), *adapters)
        return y

    def plain(value: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return value @ base.weight.detach().double().T + 0.25 * (value @ down.T) @ up.T

    inputs: list[Any] = [x, a, b]
    wide = [tensor.detach().double() for tensor in inputs]
    yield "lora_linear", fused(x, a, b).detach(), plain(*wide)
    wanted = _gradients(plain, wide, gradient.double())
    for name, got, right in zip(("x", "a", "b"), _gradients(fused, inputs, gradient), wanted, strict=True):
        yield f"lora_linear_d_{name}", got, right
