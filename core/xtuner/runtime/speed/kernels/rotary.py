"""Splits the stacked query/key/value projection into heads and turns queries and keys, in one pass over memory."""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS_PER_PROGRAM: Final = 32


@triton.jit
def _turn(
    stacked, query, key, value, table, positions, tokens, half_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = DIM // 2
    cols = tl.arange(0, BLOCK_HALF)
    inside = (rows < tokens)[:, None] & (cols < half)[None, :]
    groups: tl.constexpr = HEADS // KV_HEADS
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    # `slot`: where the head lies in the stacked projection; InternLM2 stacks [group of queries, key, value] for each KV head.
    if head < HEADS:
        part = query + rows[:, None] * (HEADS * DIM) + head * DIM + cols[None, :]
        slot = (head // groups) * (groups + 2) + head % groups if INTERLEAVED else head
    elif head < HEADS + KV_HEADS:
        index = head - HEADS
        part = key + rows[:, None] * (KV_HEADS * DIM) + index * DIM + cols[None, :]
        slot = index * (groups + 2) + groups if INTERLEAVED else head
    else:
        index = head - HEADS - KV_HEADS
        part = value + rows[:, None] * (KV_HEADS * DIM) + index * DIM + cols[None, :]
        slot = index * (groups + 2) + groups + 1 if INTERLEAVED else head
    whole = stacked + rows[:, None] * width + slot * DIM + cols[None, :]
    if BACKWARD:
        first = tl.load(part, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(part + half, mask=inside, other=0.0).to(tl.float32)
    else:
        first = tl.load(whole, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(whole + half, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        position = tl.load(positions + rows, mask=rows < tokens, other=0)
        cos = tl.load(table + position[:, None] * DIM + cols[None, :], mask=inside, other=0.0)
        sin = tl.load(table + half_stride + position[:, None] * DIM + cols[None, :], mask=inside, other=0.0)
        if BACKWARD:
            sin = -sin
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if BACKWARD:
        tl.store(whole, first.to(stacked.dtype.element_ty), mask=inside)
        tl.store(whole + half, second.to(stacked.dtype.element_ty), mask=inside)
    else:
        tl.store(part, first.to(stacked.dtype.element_ty), mask=inside)
        tl.store(part + half, second.to(stacked.dtype.element_ty), mask=inside)


class SplitAndTurn(torch.autograd.Function):
    """stacked (tokens, (heads + 2 kv_heads)·dim) → query, key, value (tokens, heads, dim), rotary applied in fp32.

    table: (2, positions, dim) of cos and sin in fp32, the second half of dim repeating the first; positions: (tokens) int64.
    Formula: Su et al. 2021, arXiv 2104.09864, in the half-split layout of the Llama family.
    """

    @staticmethod
    def forward(
        ctx: Any, stacked: Tensor, table: Tensor, positions: Tensor, heads: int, kv_heads: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, dim = stacked.shape[0], table.shape[-1]
        query = stacked.new_empty(tokens, heads, dim)
        key = stacked.new_empty(tokens, kv_heads, dim)
        value = stacked.new_empty(tokens, kv_heads, dim)
        ctx.shape = (heads, kv_heads, interleaved)
        ctx.save_for_backward(table, positions)
        _run(stacked.contiguous(), query, key, value, table, positions, ctx.shape, backward=False)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        table, positions = ctx.saved_tensors
        heads, kv_heads, _ = ctx.shape
        query, key, value = (gradient.contiguous() for gradient in gradients)
        stacked = query.new_empty(query.shape[0], (heads + 2 * kv_heads) * table.shape[-1])
        _run(stacked, query, key, value, table, positions, ctx.shape, backward=True)
        return stacked, None, None, None, None, None


def _run(
    stacked: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, positions: Tensor,
    shape: tuple[int, int, bool], *, backward: bool,
) -> None:  # fmt: skip
    heads, kv_heads, interleaved = shape
    tokens, dim = query.shape[0], table.shape[-1]
    grid = (triton.cdiv(tokens, _TOKENS_PER_PROGRAM), heads + 2 * kv_heads)
    _turn[grid](
        stacked, query, key, value, table, positions, tokens, table.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK_HALF=triton.next_power_of_2(dim // 2),
        INTERLEAVED=interleaved, BACKWARD=backward, BLOCK=_TOKENS_PER_PROGRAM,
    )  # fmt: skip
