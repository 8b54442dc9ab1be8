"""Single terms of the memory formula, each seen in the difference that one setting makes: totals alone hide a term that is small."""

from typing import Any

import pytest

from core.config.memory import formula
from core.config.memory.moments import Moment, peak
from core.config.memory.setup import Engine, Setup
from tests.core.config.memory_cases import deepspeed, shape

MODEL = shape("internlm2-1.8b")
TOKENS_HIDDEN = 2048 * 2048
"""Tokens of the micro-batch × hidden size."""
LAYERS_ALONE = ("wqkv", "wo", "w1", "w2", "w3")
"""Every linear layer but the head."""


def amp(**options: Any) -> Setup:
    return Setup(**{"engine": Engine.AMP, "accumulation": 2, "weights": "bfloat16", **options})


def at(moment: Moment, setup: Setup) -> int:
    return peak(MODEL, setup).moments[moment]


def trained(setup: Setup) -> int:
    return formula.count(MODEL, setup).trained


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.5 + 0.015625 + 0.000244140625),  # a byte a block of 64, and a float32 a block of 256 of those
        ({"is_double_quantized": False}, 0.5625),  # a float32 a block of 64
        ({"bits": 8}, 1.0),
    ],
)
def test_bytes_of_a_packed_weight(options: dict[str, Any], expected: float) -> None:
    assert formula.packed_bytes(amp(method="qlora", **options)) == expected


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (deepspeed(), 2 * 2 * 500_000_000),
        (deepspeed(overlaps=False), 2 * 500_000_000),
        (deepspeed(stage=3), 2 * 500_000_000),
        (deepspeed(stage=1, bucket_elements=1000), 2 * 2 * 1000),
        (amp(), 0),
        (amp(world_size=2), 4 * 68_968_448),
        (amp(world_size=2, method="full", weights="float32"), 4 * MODEL.parameters),
        (amp(world_size=2, method="full"), 2 * MODEL.parameters),
    ],
)
def test_bytes_of_the_buckets(setup: Setup, expected: int) -> None:
    assert formula.buckets(setup, formula.count(MODEL, setup)) == expected


@pytest.mark.parametrize(
    ("name", "batch", "each"), [("internlm2-1.8b", 1, 8), ("internlm2-1.8b", 2, 12), ("llama3-8b", 1, 10)]
)
def test_bytes_of_a_tokens_logits(name: str, batch: int, each: int) -> None:
    assert formula.logits_bytes(shape(name), amp(batch_size=batch)) == each * shape(name).vocabulary


@pytest.mark.parametrize("make", [amp, deepspeed])
def test_dropout_before_the_head_keeps_a_mask(make: Any) -> None:
    """One byte an element; none where the head has no adapter."""
    for targets, expected in ((None, TOKENS_HIDDEN), (LAYERS_ALONE, 0)):
        with_mask, without = (at(Moment.FORWARD, make(dropout=dropout, targets=targets)) for dropout in (0.1, 0.0))
        assert with_mask - without == expected


def test_an_adapter_on_the_head_costs_its_parameters_and_a_product() -> None:
    whole, layers = amp(), amp(targets=LAYERS_ALONE)
    more = trained(whole) - trained(layers)
    assert more == 64 * (MODEL.hidden + MODEL.vocabulary)
    # float32 weights, moments, gradients, autocast's copy; its second matrix cast, and the mask.
    expected = (4 + 8 + 4 + 2) * more + 2 * 64 * MODEL.vocabulary + TOKENS_HIDDEN
    assert at(Moment.FORWARD, whole) - at(Moment.FORWARD, layers) == pytest.approx(expected, abs=2)


def test_the_end_of_the_model_in_16_bits() -> None:
    """Without layers' own activations: the final norm in float32 and 16 bits, input and mask of the head, and the logits."""
    setup = deepspeed(accumulation=1)
    held = formula.static(setup, formula.count(MODEL, setup)).total + formula.workspace()
    checkpoints = 2 * TOKENS_HIDDEN * (MODEL.layers + 1)
    rest = at(Moment.FORWARD, setup) - held - checkpoints - 8 * 2048 * MODEL.vocabulary
    assert rest == pytest.approx((6 + 3) * TOKENS_HIDDEN, abs=2)


def test_gradients_of_a_micro_step() -> None:
    """ZeRO-1 holds a second copy, ZeRO-2 moves them on; torch adds in place, so accumulation changes nothing at their peak."""
    extra = at(Moment.LAYER, deepspeed(stage=1)) - at(Moment.LAYER, deepspeed(stage=2))
    assert extra == 2 * trained(deepspeed())
    for options in ({"method": "lora"}, {"method": "full", "weights": "float32"}, {"method": "full"}):
        alone, gathered = (at(Moment.LAYER, amp(accumulation=count, **options)) for count in (1, 2))
        assert alone == gathered


def test_offloading_takes_moments_gradients_and_the_step_off_the_device() -> None:
    setup = deepspeed(is_offloaded=True)
    held = formula.static(setup, formula.count(MODEL, setup))
    assert (held.optimizer, held.gradients) == (0, 0)
    assert at(Moment.STEP, setup) == pytest.approx(held.weights + held.adapters + formula.workspace(), abs=1)
    for stage, extra in ((1, 2 + 2), (2, 2)):  # kept and new gradients
        on, off = (at(Moment.LAYER, deepspeed(stage=stage, is_offloaded=away)) for away in (False, True))
        assert on - off == (12 + extra) * trained(setup)


def test_the_step_of_several_ranks() -> None:
    """ZeRO shares moments and what the step makes anew, its gradients gone by then; data parallel training keeps copies to exchange."""
    for stage in (1, 2):
        one, two = (at(Moment.STEP, deepspeed(stage=stage, world_size=count)) for count in (1, 2))
        assert one - two == pytest.approx((12 + 8) / 2 * trained(deepspeed()), abs=2)
    for moment in (Moment.LOSS, Moment.LAYER, Moment.STEP):
        assert at(moment, amp(world_size=2)) - at(moment, amp()) == 4 * trained(amp())


def test_a_packed_matrix_is_unpacked_while_its_layer_runs_backward() -> None:
    packed, plain = deepspeed(method="qlora"), deepspeed(method="lora")
    counts = formula.count(MODEL, plain)
    saved = counts.linear * (2 - formula.packed_bytes(packed))
    expected = 2 * MODEL.hidden * MODEL.intermediate - saved
    assert at(Moment.LAYER, packed) - at(Moment.LAYER, plain) == pytest.approx(expected, abs=2)


def test_copies_of_a_layers_weights_live_in_its_backward_pass() -> None:
    """Under autocast, beside what the layer keeps for each token; with checkpointing those of one layer."""
    short, long = (amp(length=length) for length in (1024, 2048))
    counts = formula.count(MODEL, long)
    per_token = counts.layer_token_bytes + counts.work_token_bytes + 4 * MODEL.hidden * (MODEL.layers + 1)
    assert at(Moment.LAYER, long) - at(Moment.LAYER, short) == pytest.approx(1024 * per_token, abs=2)
    held = formula.static(long, counts).total + formula.workspace()
    assert at(Moment.LAYER, long) - held - 2048 * per_token == pytest.approx(counts.layer_fixed_bytes, abs=2)


def test_zero3_shares_the_weights_and_gathers_some() -> None:
    """Not those in 4 bits, which it cannot gather, nor where there is nobody to gather from."""

    def weights(**options: Any) -> float:
        setup = deepspeed(stage=3, **options)
        return formula.static(setup, formula.count(MODEL, setup)).weights

    base, ends = MODEL.parameters, 2 * MODEL.vocabulary * MODEL.hidden  # embedding and head come whatever the limit is
    assert weights(method="full") == 2 * base
    assert weights(method="full", world_size=2) == base + 2 * min(1_000_000_000 + ends, base)
    assert weights(method="full", world_size=4, live_elements=1000) == base / 2 + 2 * (1000 + ends)
    assert weights(method="full", offloads_parameters=True, live_elements=1000) == 2 * (1000 + ends)
    assert weights(method="qlora", world_size=2) == weights(method="qlora") / 2


def test_arithmetic_without_mixed_precision_is_in_float32() -> None:
    """On a CPU. Its layers keep more than autocast's, which keep 16-bit copies of weights instead."""
    plain, mixed = (Setup(engine=engine, accumulation=2, weights="float32") for engine in (Engine.PLAIN, Engine.AMP))
    counts = [formula.count(MODEL, setup) for setup in (plain, mixed)]
    assert [(one.residual, one.compute) for one in counts] == [(4, 4), (4, 2)]
    assert [bool(one.layer_fixed_bytes) for one in counts] == [False, True]
