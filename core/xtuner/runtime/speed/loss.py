"""The output layer and cross-entropy together, a block of tokens at a time: the full logits never exist.

The gradients are made in the forward pass, block by block (the idea of Liger Kernel, arXiv 2410.10989), with weights near 1 so that
fp16 does not underflow; the real factor (1 / tokens, times what comes from above) is applied in the backward pass.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from core.xtuner.runtime.speed import linear
from core.xtuner.runtime.speed.backend import uses_kernels
from core.xtuner.runtime.speed.linear import Draw, LinearGroup

BLOCK_TOKENS: Final = 4096


def cross_entropy_in_place(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Loss of each row in fp32; logits (rows, vocabulary) become weight · (softmax − one-hot)."""
    if uses_kernels(logits):
        from core.xtuner.runtime.speed.kernels import cross_entropy

        return cross_entropy.cross_entropy_in_place(logits, targets, weights)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    rows = torch.arange(len(targets), device=logits.device)
    log_probabilities = torch.log_softmax(wide, dim=-1)
    losses = -log_probabilities[rows, targets]
    gradient = log_probabilities.exp_()
    gradient[rows, targets] -= 1.0
    logits.copy_(gradient.mul_(weights[:, None]))
    return losses


class HeadLoss(torch.autograd.Function):
    """Mean loss of each micro-batch, (micro_batches) in fp32, of hidden (tokens, hidden) at `rows` against `targets`.

    rows, targets, owners: (predicted tokens) int64; owners says whose micro-batch a prediction is in; shares: (predicted tokens)
    fp32, 1 / number of predictions of that micro-batch. Adapters on the head get their gradients too.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, group: LinearGroup, draws: Sequence[Draw], rows: Tensor, targets: Tensor, owners: Tensor,
        shares: Tensor, micro_batches: int, block: int, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        count = max(1, targets.shape[0])
        losses = torch.zeros(micro_batches, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.zeros_like(hidden)
        sums = [torch.zeros(p.shape, dtype=torch.float32, device=hidden.device) for p in parameters]
        for number, start in enumerate(range(0, targets.shape[0], block)):
            span = slice(start, start + block)
            x = hidden.index_select(0, rows[span])
            logits, down = linear.forward(x, group, draws[number])
            parts = cross_entropy_in_place(logits, targets[span], shares[span] * count)
            losses.index_add_(0, owners[span], (parts * shares[span]).to(losses.dtype))
            d_x, gradients = linear.backward(logits, x, down, group, draws[number])
            del logits
            assert d_x is not None
            d_hidden.index_copy_(0, rows[span], d_x)
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient)
        ctx.save_for_backward(d_hidden, *sums)
        ctx.count = count
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The caller sums the micro-batches' losses, so they share one factor; a weighted sum is not supported."""
        d_hidden, *sums = ctx.saved_tensors
        factor = gradients[0][0] / ctx.count
        cast = [(total * factor).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (d_hidden * factor.to(torch.float32)).to(d_hidden.dtype), *([None] * 8), *cast
