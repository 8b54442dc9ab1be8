"""Cross-entropy of a block of logits that leaves their gradient where the logits were. One row a program, fp32 inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _loss(logits, targets, weights, losses, columns, stride, BLOCK: tl.constexpr):  # pragma: no cover - compiled
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    target = tl.load(targets + row)
    weight = tl.load(weights + row)
    # Read before the reductions below: they are barriers, so no warp can have overwritten it yet.
    target_logit = tl.load(base + target).to(tl.float32)
    highest = float("-inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        value = tl.load(base + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
        block_highest = tl.maximum(highest, tl.max(value, axis=0))
        total = total * tl.exp(highest - block_highest) + tl.sum(tl.exp(value - block_highest), axis=0)
        highest = block_highest
    log_sum = highest + tl.log(total)
    tl.store(losses + row, log_sum - target_logit)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        value = tl.load(base + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(value - log_sum) - tl.where(cols == target, 1.0, 0.0)
        tl.store(base + cols, (gradient * weight).to(logits.dtype.element_ty), mask=cols < columns)


def cross_entropy_in_place(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Loss of each row in fp32; `logits` (rows, vocabulary) become weight · (softmax − one-hot)."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _loss[(rows,)](logits, targets, weights, losses, columns, logits.stride(0), BLOCK=4096, num_warps=8)
    return losses
