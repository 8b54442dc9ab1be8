"""Triton kernels for one new token a conversation: matrix times vector with what surrounds it, and attention over the cache.

A decoding step at batch 1 reads every weight once, so memory bandwidth is its limit; these kernels exist to leave nothing
else to wait for. Knows tensors only. Imported on a GPU (or under Triton's interpreter in tests) and nowhere else.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS: Final = 16
"""Parts of a conversation that are attended to at the same time (split-K decoding, Dao et al. 2023, "Flash-Decoding")."""
_PLACES: Final = 32
"""Keys looked at in one go."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a matrix is cut: rows and columns a program takes at a time, and its warps."""

    outputs: int
    inputs: int
    warps: int


@triton.jit  # type: ignore[untyped-decorator]
def _matvec(
    x, norm, weight, bias, residual, low, low_b, scale, out, outputs, inputs, rank, epsilon,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_LOW: tl.constexpr,
    HAS_SCALE: tl.constexpr, IS_GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    first = tl.program_id(0) * BLOCK_N
    within = tl.arange(0, BLOCK_N)
    n = first + within
    has_row = n[:, None] < outputs
    here = weight + first.to(tl.int64) * inputs
    there = weight + (first + outputs).to(tl.int64) * inputs
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < inputs
        value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
        mask = has_row & inside[None, :]
        offsets = within[:, None] * inputs + k[None, :]
        tile = tl.load(here + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        sums += tile.to(tl.float32) * value[None, :]
        if IS_GATED:
            tile = tl.load(there + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            up_sums += tile.to(tl.float32) * value[None, :]
    y = tl.sum(sums, axis=1)
    up = tl.sum(up_sums, axis=1)
    if HAS_NORM:  # the norm is one factor for all inputs, so it can be applied to the sum
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / inputs + epsilon)
        y *= rstd
        up *= rstd
    if HAS_LOW:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            part = tl.load(low + r, mask=r < rank, other=0.0).to(tl.float32)
            mask = has_row & (r[None, :] < rank)
            tile = tl.load(low_b + n[:, None] * rank + r[None, :], mask=mask, other=0.0).to(tl.float32)
            y += tl.sum(tile * part[None, :], axis=1)
            if IS_GATED:
                offsets = (n[:, None] + outputs) * rank + r[None, :]
                tile = tl.load(low_b + offsets, mask=mask, other=0.0).to(tl.float32)
                up += tl.sum(tile * part[None, :], axis=1)
    kept = n < outputs
    if HAS_BIAS:
        y += tl.load(bias + n, mask=kept, other=0.0).to(tl.float32)
        if IS_GATED:
            up += tl.load(bias + outputs + n, mask=kept, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y *= tl.load(scale).to(tl.float32)
    # Rounded where the separate operations would have rounded, so that the tokens are the same.
    y = y.to(out.dtype.element_ty).to(tl.float32)
    if IS_GATED:
        up = up.to(out.dtype.element_ty).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(out.dtype.element_ty).to(tl.float32) * up
    if HAS_RESIDUAL:
        y += tl.load(residual + n, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(
    base, norm, cos, sin, d, HEAD_DIM: tl.constexpr, HAS_NORM: tl.constexpr, epsilon
):  # pragma: no cover - compiled
    """One head at `base`, normed if asked, rotated to its position; float32, rounded as the model's dtype rounds."""
    inside = d < HEAD_DIM
    half = (d + HEAD_DIM // 2) % HEAD_DIM
    value = tl.load(base + d, mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(base + half, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / HEAD_DIM + epsilon)
        value *= rstd * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
        turned *= rstd * tl.load(norm + half, mask=inside, other=0.0).to(tl.float32)
        value = value.to(base.dtype.element_ty).to(tl.float32)
        turned = turned.to(base.dtype.element_ty).to(tl.float32)
    cosine = tl.load(cos + d, mask=inside, other=0.0).to(base.dtype.element_ty).to(tl.float32)
    sine = tl.load(sin + d, mask=inside, other=0.0).to(base.dtype.element_ty).to(tl.float32)
    return (value * cosine + turned * sine).to(base.dtype.element_ty).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    qkv, query_norm, key_norm, cos, sin, order, positions, keys, values, sums, peaks, masses,
    heads, groups, length, slot_stride, head_stride, scale, epsilon,
    HAS_NORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    row = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    kv_head = head // groups
    kv_heads = heads // groups
    position = tl.load(positions + row)
    is_idle = position >= length  # writes to a spare place that nobody reads, looks at nothing
    past = tl.where(is_idle, 0, position)
    slot = tl.where(is_idle, 0, tl.load(order + row))
    angle = tl.minimum(position, length - 1) * HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    inside = d < HEAD_DIM
    token = qkv + row * (heads + 2 * kv_heads) * HEAD_DIM
    query = _rotated(token + head * HEAD_DIM, query_norm, cos + angle, sin + angle, d, HEAD_DIM, HAS_NORM, epsilon)
    place = slot * slot_stride + kv_head * head_stride
    mass = tl.sum(tl.zeros((BLOCK,), tl.float32), axis=0)
    peak = mass - float("inf")
    sum_ = tl.zeros((BLOCK_D,), tl.float32)
    chunk = tl.cdiv(past, PARTS * BLOCK) * BLOCK
    first = part * chunk
    last = tl.minimum(first + chunk, past)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        mask = (n[:, None] < last) & inside[None, :]
        tile = place + n[:, None] * HEAD_DIM + d[None, :]
        key = tl.load(keys + tile, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(key * query[None, :], axis=1) * scale
        score = tl.where(n < last, score, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=0))
        share = tl.exp(score - new_peak)
        faded = tl.exp(peak - new_peak)
        value = tl.load(values + tile, mask=mask, other=0.0).to(tl.float32)
        sum_ = sum_ * faded + tl.sum(share[:, None] * value, axis=0)
        mass = mass * faded + tl.sum(share, axis=0)
        peak = new_peak
    if part == 0:  # the new token itself: attended to here, and kept
        base = token + (heads + kv_head) * HEAD_DIM
        key = _rotated(base, key_norm, cos + angle, sin + angle, d, HEAD_DIM, HAS_NORM, epsilon)
        value = tl.load(base + kv_heads * HEAD_DIM + d, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(key * query, axis=0) * scale
        new_peak = tl.maximum(peak, score)
        share = tl.exp(score - new_peak)
        faded = tl.exp(peak - new_peak)
        sum_ = sum_ * faded + share * value
        mass = mass * faded + share
        peak = new_peak
        if head % groups == 0:
            written = place + position * HEAD_DIM + d
            tl.store(keys + written, key.to(keys.dtype.element_ty), mask=inside)
            tl.store(values + written, value.to(values.dtype.element_ty), mask=inside)
    at = (row * heads + head) * PARTS + part
    tl.store(sums + at * HEAD_DIM + d, sum_, mask=inside)
    tl.store(peaks + at, peak)
    tl.store(masses + at, mass)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(
    sums, peaks, masses, out, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr
):  # pragma: no cover - compiled
    at = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    parts = at * PARTS + tl.arange(0, PARTS)
    peak = tl.load(peaks + parts)
    share = tl.exp(peak - tl.max(peak, axis=0))
    mass = tl.sum(share * tl.load(masses + parts), axis=0)
    mask = d[None, :] < HEAD_DIM
    part_sums = tl.load(sums + parts[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    total = tl.sum(part_sums * share[:, None], axis=0) / mass
    tl.store(out + at * HEAD_DIM + d, total.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def choose_blocks(outputs: int, inputs: int, *, is_gated: bool) -> Blocks:
    """Few rows a program, so that even small matrices fill the GPU; columns as wide as 16 bytes a thread allow."""
    if outputs >= 32768:
        return Blocks(8, min(1024, triton.next_power_of_2(inputs)), 4)
    return Blocks(2 if is_gated else 4, min(1024, triton.next_power_of_2(inputs)), 4)


def matvec(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    low: Tensor | None = None,
    low_b: Tensor | None = None,
    scale: Tensor | None = None,
    is_gated: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """`weight` (outputs, inputs) times `x` (1, inputs), with what comes before and after it; gives (1, outputs).

    norm: weights of an RMSNorm of `x` first. low, low_b: adds `low_b @ low`. bias, scale, residual: added, multiplied, added,
    in this order. is_gated: `weight` holds the gate's rows, then the up projection's: gives silu(gate)·up.
    """
    outputs, inputs = weight.shape[0] // (2 if is_gated else 1), weight.shape[1]
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
    cut = blocks or choose_blocks(outputs, inputs, is_gated=is_gated)
    rank = 0 if low is None else low.shape[-1]
    _matvec[(triton.cdiv(outputs, cut.outputs),)](
        x, _or(norm, x), weight, _or(bias, x), _or(residual, x), _or(low, x), _or(low_b, x), _or(scale, x), out,
        outputs, inputs, rank, epsilon,
        HAS_NORM=norm is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_LOW=low is not None, HAS_SCALE=scale is not None, IS_GATED=is_gated,
        BLOCK_N=cut.outputs, BLOCK_K=cut.inputs, BLOCK_R=64, num_warps=cut.warps,
    )  # fmt: skip
    return out


class Attention:
    """Attention of one new token in each row over its own slot of a cache; keeps room for the parts' results."""

    def __init__(
        self, rows: int, heads: int, kv_heads: int, head_dim: int, epsilon: float, device: torch.device
    ) -> None:
        """`epsilon`: of the norms on query and key, where the model has them."""
        self._heads, self._kv_heads, self._head_dim, self._epsilon = heads, kv_heads, head_dim, epsilon
        self._sums = torch.empty((rows, heads, SPLITS, head_dim), dtype=torch.float32, device=device)
        self._peaks = torch.empty((rows, heads, SPLITS), dtype=torch.float32, device=device)
        self._masses = torch.empty_like(self._peaks)

    def attend(
        self, *, qkv: Tensor, cache: Tensor, order: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor],
        norms: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:  # fmt: skip
        """(rows, heads · head_dim) of `qkv` (rows, (heads + 2 kv_heads) · head_dim), whose keys and values are kept in `cache`.

        cache: (2, slots, kv_heads, length + 1, head_dim) of one layer; row i's slot is order[i], its place positions[i]; a
        place of `length` means the row is idle. angles: cos and signed sin (places, head_dim).
        """
        rows, dim = qkv.shape[0], self._head_dim
        keys, values = cache
        query_norm, key_norm = norms
        block: dict[str, Any] = {"HEAD_DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "PARTS": SPLITS}
        out = torch.empty((rows, self._heads * dim), dtype=qkv.dtype, device=qkv.device)
        _attend[(rows, self._heads, SPLITS)](
            qkv, _or(query_norm, qkv), _or(key_norm, qkv), *angles, order, positions, keys, values,
            self._sums, self._peaks, self._masses, self._heads, self._heads // self._kv_heads, keys.shape[2] - 1,
            keys.stride(0), keys.stride(1), dim**-0.5, self._epsilon,
            HAS_NORM=query_norm is not None, BLOCK=_PLACES, num_warps=4, **block,
        )  # fmt: skip
        _combine[(rows * self._heads,)](self._sums, self._peaks, self._masses, out, num_warps=4, **block)
        return out


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer must be given even where it is not read."""
    return stand_in if tensor is None else tensor
