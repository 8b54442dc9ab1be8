"""LoRA layers and the fused loss against autograd on their formulas; frozen weights settled, shared and in 4 bits."""

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def test_stacked_adapters_with_dropout_against_autograd() -> None:
    """Two projections of one input, one with an adapter and a bias: the same masks, drawn here by the formula."""
    import torch
    from torch import nn

    from core.xtuner.runtime.speed import dropout
    from core.xtuner.runtime.speed.linear import AdaptedLinear, Adapter, Draw, LinearGroup
    from core.xtuner.runtime.speed.weights import FrozenWeight

    torch.manual_seed(0)
    double = torch.float64
    bases = [nn.Linear(12, 10, bias=False, dtype=double), nn.Linear(12, 6, dtype=double)]
    a, b = nn.Parameter(torch.randn(3, 12, dtype=double)), nn.Parameter(torch.randn(6, 3, dtype=double))
    group = LinearGroup(FrozenWeight(bases), [None, Adapter(a, b, 0.5, 0.4)], 0)
    group.refresh(double)
    x = torch.randn(20, 12, dtype=double, requires_grad=True)
    gradient = torch.randn(20, 16, dtype=double)
    y = AdaptedLinear.apply(x, group, Draw(0.4, (99,), None), *group.parameters)
    mask = dropout.keep_mask(20, 12, 99, 0.4, x.device)
    wanted = torch.cat([bases[0](x), bases[1](x) + 0.5 * (x * mask / 0.6) @ a.T @ b.T], dim=1)
    assert torch.allclose(y, wanted, atol=1e-12)
    ours = torch.autograd.grad(y, [x, a, b], gradient)
    theirs = torch.autograd.grad(wanted, [x, a, b], gradient)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_masks_drop_the_asked_share_and_differ_by_seed(probability: float) -> None:
    import torch

    from core.xtuner.runtime.speed.dropout import keep_mask

    device = torch.device("cpu")
    masks = [keep_mask(500, 400, seed, probability, device) for seed in (1, 2, 2**31 - 2)]
    count = masks[0].numel()
    spread = (probability * (1 - probability) / count) ** 0.5
    for mask in masks:
        assert abs(float((~mask).float().mean()) - probability) < 5 * spread
        assert abs(float((~mask).float().mean(0).std()) - (probability * (1 - probability) / 500) ** 0.5) < 0.004
    both = float((~masks[0] & ~masks[1]).float().mean())
    assert abs(both - probability**2) < 5 * (probability**2 / count) ** 0.5, "the masks of two seeds are independent"


@pytest.mark.parametrize("block", [7, 64])
def test_the_fused_loss_against_autograd(block: int) -> None:
    import torch
    from torch import nn
    from torch.nn import functional

    from core.xtuner.runtime.speed.linear import Adapter, Draw, LinearGroup
    from core.xtuner.runtime.speed.loss import HeadLoss
    from core.xtuner.runtime.speed.weights import FrozenWeight

    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    a, b = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(50, 4))
    group = LinearGroup(FrozenWeight([head]), [Adapter(a, b, 0.3, 0.0)], 0)
    group.refresh(torch.float32)
    hidden = torch.randn(30, 16, requires_grad=True)
    rows = torch.arange(0, 30, 2)[torch.randperm(15)]
    targets = torch.randint(0, 50, (15,))
    owners = torch.tensor([0] * 5 + [1] * 10)
    shares = torch.tensor([1 / 5] * 5 + [1 / 10] * 10)
    draws = [Draw(0.0, (), None)] * 5
    losses = HeadLoss.apply(hidden, group, draws, rows, targets, owners, shares, 2, block, a, b)
    logits = head(hidden) + 0.3 * hidden @ a.T @ b.T
    each = functional.cross_entropy(logits[rows], targets, reduction="none")
    wanted = torch.stack([each[:5].mean(), each[5:].mean()])
    assert torch.allclose(losses, wanted, atol=1e-5)
    ours = torch.autograd.grad(losses.sum() * 0.125, [hidden, a, b])
    theirs = torch.autograd.grad(wanted.sum() * 0.125, [hidden, a, b])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, theirs, strict=True))


def test_adapters_of_one_input_must_be_alike() -> None:
    import torch
    from torch import nn

    from core.xtuner.runtime.speed.linear import Adapter, LinearGroup
    from core.xtuner.runtime.speed.weights import FrozenWeight

    def pair(rank: int) -> Adapter:
        return Adapter(nn.Parameter(torch.randn(rank, 8)), nn.Parameter(torch.randn(8, rank)), 1.0, 0.0)

    with pytest.raises(ValueError, match="share rank"):
        LinearGroup(FrozenWeight([nn.Linear(8, 8), nn.Linear(8, 8)]), [pair(2), pair(4)], 0)


def test_settled_weights_are_held_once_and_layers_still_answer() -> None:
    import torch
    from torch import nn

    from core.xtuner.runtime.speed.weights import FrozenWeight

    layers = [nn.Linear(8, 4, bias=False), nn.Linear(8, 6)]
    x = torch.randn(3, 8)
    before = [layer(x) for layer in layers]
    weight = FrozenWeight(layers)
    weight.settle(torch.bfloat16)
    dense = weight.dense(torch.bfloat16)
    assert dense.shape == (10, 8)
    assert layers[1].weight.data_ptr() == dense[4:].data_ptr()
    for layer, old in zip(layers, before, strict=True):
        assert layer(x).dtype == torch.float32
        assert torch.allclose(layer(x), old, atol=0.05)
    tied = nn.Linear(8, 4, bias=False)
    shared = FrozenWeight([tied])
    shared.settle(torch.bfloat16, shared=True)
    assert tied.weight.dtype == torch.float32, "the embedding reads it too"


def test_4bit_weights_are_unpacked_as_bitsandbytes_does() -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    from core.xtuner.runtime.speed.weights import FrozenWeight

    torch.manual_seed(0)
    layers = [Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu") for _ in range(2)]
    x = torch.randn(5, 64, requires_grad=True)
    wanted = torch.cat([layer(x) for layer in layers], dim=1)
    weight = FrozenWeight(layers)
    assert weight.packed
    assert torch.allclose(x @ weight.dense(torch.float32).T, wanted, atol=1e-4)
    weight.unpack(torch.float32)
    assert torch.allclose(x @ weight.dense(torch.float32).T, wanted, atol=1e-4)
