"""The adapter's matrix products with dropout made inside the kernel: the dropped input is never stored, nor is its mask."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS: Final = 64
_COLUMNS: Final = 64
_TOKENS_PER_SPLIT: Final = 2048


@triton.jit
def _keep(index, seed, threshold):  # pragma: no cover - compiled
    """Whether the element stays: a counter hash (multiply-xorshift, 32 bits), the same as `dropout.keep_mask`."""
    x = index ^ seed
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x += seed
    x *= 0x735A2D97
    x ^= x >> 15
    return (x >> 8) >= threshold


@triton.jit
def _down(
    x, a, out, tokens, columns, x_stride, seeds, threshold, keep_scale, RANK: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    adapter = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R)
    seed = tl.load(seeds + adapter).to(tl.uint32)
    threshold = threshold.to(tl.uint32)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, columns, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = (rows < tokens)[:, None] & (cols < columns)[None, :]
        value = tl.load(x + rows[:, None].to(tl.int64) * x_stride + cols[None, :], mask=inside, other=0.0)
        index = rows[:, None].to(tl.uint32) * columns.to(tl.uint32) + cols[None, :].to(tl.uint32)
        value = tl.where(_keep(index, seed, threshold), value, 0.0).to(x.dtype.element_ty)
        weight = tl.load(
            a + (adapter * RANK + ranks)[None, :] * columns + cols[:, None],
            mask=(ranks < RANK)[None, :] & (cols < columns)[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(value, weight, acc, input_precision="ieee")
    target = out + rows[:, None].to(tl.int64) * (RANK * COUNT) + adapter * RANK + ranks[None, :]
    tl.store(
        target, (acc * keep_scale).to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (ranks < RANK)[None, :]
    )


@triton.jit
def _up(
    d_x, d_down, a, tokens, columns, seeds, threshold, keep_scale, RANK: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    inside = (rows < tokens)[:, None] & (cols < columns)[None, :]
    index = rows[:, None].to(tl.uint32) * columns.to(tl.uint32) + cols[None, :].to(tl.uint32)
    threshold = threshold.to(tl.uint32)
    target = d_x + rows[:, None].to(tl.int64) * columns + cols[None, :]
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    for adapter in tl.static_range(COUNT):
        seed = tl.load(seeds + adapter).to(tl.uint32)
        gradient = tl.load(
            d_down + rows[:, None].to(tl.int64) * (RANK * COUNT) + adapter * RANK + ranks[None, :],
            mask=(rows < tokens)[:, None] & (ranks < RANK)[None, :], other=0.0,
        )  # fmt: skip
        weight = tl.load(
            a + (adapter * RANK + ranks)[:, None] * columns + cols[None, :],
            mask=(ranks < RANK)[:, None] & (cols < columns)[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(gradient, weight, input_precision="ieee") * keep_scale
        total += tl.where(_keep(index, seed, threshold), product, 0.0)
    tl.store(target, total.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _weight(
    x, d_down, partial, tokens, columns, x_stride, seeds, threshold, keep_scale, RANK: tl.constexpr,
    COUNT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    adapter = tl.program_id(1)
    split = tl.program_id(2)
    ranks = tl.arange(0, BLOCK_R)
    seed = tl.load(seeds + adapter).to(tl.uint32)
    threshold = threshold.to(tl.uint32)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(split * SPLIT, split * SPLIT + SPLIT, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        inside = (rows < tokens)[:, None] & (cols < columns)[None, :]
        value = tl.load(x + rows[:, None].to(tl.int64) * x_stride + cols[None, :], mask=inside, other=0.0)
        index = rows[:, None].to(tl.uint32) * columns.to(tl.uint32) + cols[None, :].to(tl.uint32)
        value = tl.where(_keep(index, seed, threshold), value, 0.0).to(x.dtype.element_ty)
        gradient = tl.load(
            d_down + rows[None, :].to(tl.int64) * (RANK * COUNT) + adapter * RANK + ranks[:, None],
            mask=(rows < tokens)[None, :] & (ranks < RANK)[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(gradient, value, acc, input_precision="ieee")
    target = partial + ((split * COUNT + adapter) * RANK + ranks).to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(target, acc * keep_scale, mask=(ranks < RANK)[:, None] & (cols < columns)[None, :])


def _block_rank(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


def down(x: Tensor, a: Tensor, count: int, seeds: Tensor, threshold: int, keep_scale: float) -> Tensor:
    """drop_i(x) · a_iᵀ side by side: x (tokens, columns), a (count·rank, columns) → (tokens, count·rank)."""
    tokens, columns = x.shape
    rank = a.shape[0] // count
    out = x.new_empty(tokens, a.shape[0])
    _down[(triton.cdiv(tokens, _TOKENS), count)](
        x, a, out, tokens, columns, x.stride(0), seeds, threshold, keep_scale, RANK=rank, COUNT=count,
        BLOCK_T=_TOKENS, BLOCK_K=_COLUMNS, BLOCK_R=_block_rank(rank), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def add_up(d_x: Tensor, d_down: Tensor, a: Tensor, count: int, seeds: Tensor, threshold: int, scale: float) -> None:
    """d_x += Σ_i mask_i ∘ (d_down_i · a_i) · scale, in place: d_x (tokens, columns) contiguous."""
    tokens, columns = d_x.shape
    rank = a.shape[0] // count
    _up[(triton.cdiv(tokens, _TOKENS), triton.cdiv(columns, 128))](
        d_x, d_down, a, tokens, columns, seeds, threshold, scale, RANK=rank, COUNT=count,
        BLOCK_T=_TOKENS, BLOCK_K=128, BLOCK_R=_block_rank(rank), num_warps=4,
    )  # fmt: skip


def weight_gradient(x: Tensor, d_down: Tensor, count: int, seeds: Tensor, threshold: int, keep_scale: float) -> Tensor:
    """d_down_iᵀ · drop_i(x), one under the other, in fp32: (count·rank, columns)."""
    tokens, columns = x.shape
    total_rank = d_down.shape[1]
    rank = total_rank // count
    splits = triton.cdiv(tokens, _TOKENS_PER_SPLIT)
    partial = torch.empty(splits, total_rank, columns, dtype=torch.float32, device=x.device)
    _weight[(triton.cdiv(columns, _COLUMNS), count, splits)](
        x, d_down, partial, tokens, columns, x.stride(0), seeds, threshold, keep_scale, RANK=rank, COUNT=count,
        SPLIT=_TOKENS_PER_SPLIT, BLOCK_T=_TOKENS, BLOCK_K=_COLUMNS, BLOCK_R=_block_rank(rank), num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial.sum(0) if splits > 1 else partial[0]
