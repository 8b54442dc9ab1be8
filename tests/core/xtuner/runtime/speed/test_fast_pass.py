"""The fast pass computes what the stock model computes: losses and gradients against fp64, samples apart, groups, recomputation."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.core.xtuner.runtime.speed.conftest import WRITERS, packed_batch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
Build = Callable[..., Any]


def fast_pass(model: Any, **options: Any) -> Any:
    import torch

    from core.xtuner.runtime.speed.anatomy import read_decoder
    from core.xtuner.runtime.speed.decoder import FastPass, PassOptions

    return FastPass(read_decoder(model.llm), PassOptions(**{"dtype": torch.float32, **options}))


def flat(*micro_batches: Any, by_sample: bool) -> Any:
    import torch

    from core.xtuner.runtime.speed.batches import flatten

    return flatten(micro_batches, torch.device("cpu"), by_sample=by_sample)


def stock_losses(model: Any, data: dict[str, Any]) -> Any:
    """The stock loss of a micro-batch, with padding, as XTuner's collate function gives it."""
    from core.xtuner.runtime.speed.batches import without_bounds

    return model.compute_loss(without_bounds({"data": data})["data"])["loss"]


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    import torch

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def relative_error(got: dict[str, Any], wanted: dict[str, Any]) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[name].double() - wanted[name]).norm() / wanted[name].norm()) for name in got)


@pytest.mark.parametrize("family", WRITERS)
def test_loss_and_gradients_against_fp64(build: Build, family: str) -> None:
    """Rows of unlike lengths, without bounds: what stock XTuner computes."""
    model = build(family)
    data = packed_batch([17, 20], [9, 5], seed=2)
    reference = copy.deepcopy(model).double()
    wanted = stock_losses(reference, data)
    loss = fast_pass(model)(flat(data, by_sample=False), 1)
    assert abs(float(loss) - float(wanted)) < 1e-5 * float(wanted)
    assert relative_error(gradients(model, loss.sum()), gradients(reference, wanted)) < 2e-5


@pytest.mark.parametrize("family", WRITERS)
def test_packed_samples_do_not_see_each_other(build: Build, family: str) -> None:
    """The loss of a packed row equals that of its samples, each computed alone by the stock model."""
    model = build(family)
    lengths = [11, 23, 7]
    data = packed_batch(lengths, seed=3)
    reference = copy.deepcopy(model).double()
    total, count, start = 0.0, 0, 0
    for length in lengths:
        span = slice(start, start + length)
        alone = {name: data[name][:, span] for name in ("input_ids", "labels", "attention_mask", "position_ids")}
        predicted = int((alone["labels"][:, 1:] != -100).sum())
        total = total + reference.compute_loss(alone)["loss"] * predicted
        count += predicted
        start += length
    wanted = total / count
    loss = fast_pass(model)(flat(data, by_sample=True), 1)
    assert abs(float(loss) - float(wanted)) < 1e-5 * float(wanted)
    assert relative_error(gradients(model, loss.sum()), gradients(reference, wanted)) < 2e-5
    seeing = fast_pass(model)(flat(data, by_sample=False), 1)
    assert abs(float(seeing) - float(wanted)) > 1e-3, "without bounds the samples do see each other"


def test_a_group_gives_each_micro_batch_its_own_loss(build: Build) -> None:
    model = build("internlm2")
    micro_batches = [packed_batch([12, 9], seed=4), packed_batch([30], seed=5), packed_batch([3, 4], [8], seed=6)]
    run = fast_pass(model, block_tokens=16)
    together = run(flat(*micro_batches, by_sample=True), 1)
    alone = [run(flat(data, by_sample=True), 1) for data in micro_batches]
    assert together.shape == (3,)
    for one, other in zip(together, alone, strict=True):
        assert abs(float(one) - float(other)) < 1e-5
    wanted = gradients(model, sum(loss.sum() for loss in alone))
    assert (
        relative_error(gradients(model, together.sum()), {name: value.double() for name, value in wanted.items()})
        < 1e-5
    )


def test_a_micro_batch_with_nothing_to_learn_weighs_nothing(build: Build) -> None:
    model = build("llama")
    empty = packed_batch([8], seed=7, unlearned=1.1)
    loss = fast_pass(model)(flat(packed_batch([9], seed=8), empty, by_sample=True), 1)
    assert float(loss[1]) == 0.0
    assert float(loss[0]) > 0.0


@pytest.mark.parametrize("family", ["internlm2", "qwen2"])
def test_recomputed_layers_draw_the_same_dropout(build: Build, family: str) -> None:
    import torch

    model = build(family, dropout=0.3)
    batch = flat(packed_batch([14, 18], seed=9), by_sample=True)
    kept = fast_pass(model)(batch, 77)
    again = fast_pass(model, recomputed_layers=2)(batch, 77)
    assert torch.equal(kept, again)
    wanted = gradients(model, kept.sum())
    assert all(torch.equal(value, wanted[name]) for name, value in gradients(model, again.sum()).items())
    assert not torch.equal(kept, fast_pass(model)(batch, 78)), "another seed, another mask"
    plain = fast_pass(model)(batch, 77, training=False)
    assert torch.equal(plain, fast_pass(model)(batch, 78, training=False)), "no dropout outside training"


def test_dropout_is_right_on_average(build: Build) -> None:
    """Over many masks the loss's mean is near the stock model's own mean under its own dropout."""
    import torch

    model = build("llama", dropout=0.2)
    data = packed_batch([24], seed=10)
    run = fast_pass(model)
    batch = flat(data, by_sample=False)
    with torch.no_grad():
        ours = torch.stack([run(batch, seed)[0] for seed in range(1, 61)])
        stock = torch.stack([stock_losses(model, data) for _ in range(60)])
    spread = float((ours.var() + stock.var()).sqrt()) / 60**0.5
    assert abs(float(ours.mean() - stock.mean())) < 4 * spread
    assert 0.6 < float(ours.std() / stock.std()) < 1.7


def test_the_rotary_table_does_not_stretch_short_sequences(build: Build) -> None:
    """Dynamic scaling depends on the longest position asked for: a table longer than the model's own limit would change it."""
    import torch

    from core.xtuner.runtime.speed.decoder import RotaryTable

    run = fast_pass(build("llama"))
    run.decoder.config.max_position_embeddings = 300
    table = RotaryTable(run.decoder)
    device = torch.device("cpu")
    assert table.get(200, device).shape[1] == 256
    assert table.get(290, device).shape[1] == 300
    assert table.get(310, device).shape[1] == 311
