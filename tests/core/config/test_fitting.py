"""What makes a training fit: each way needs less and is a real edit; the fitted micro-batch keeps the effective batch."""

import pytest

from core.config.memory.budget import Verdict, make_budget, read_budget
from core.config.memory.fitting import fit, options, saved_bytes
from core.config.memory.setup import Attention, Setup, Start, read_setup
from core.config.source import ConfigSource
from core.xtuner.runtime.speed.parts import Wish
from tests.core.config.memory_cases import deepspeed, shape

GIB = 2**30


def test_every_way_needs_less_and_is_sorted_by_whether_it_is_enough() -> None:
    heavy = Setup(
        method="lora", batch_size=4, length=4096, accumulation=4, is_checkpointing=False, attention=Attention.EAGER
    )
    budget = make_budget(shape("internlm2-7b"), heavy)
    found = options(budget, 80 * GIB)
    assert {option.code for option in found} >= {"attention", "batch", "checkpointing", "length", "zero2"}
    assert all(saved_bytes(budget, option) > 0 for option in found)
    light = options(make_budget(shape("internlm2-7b"), Setup(method="lora")), 80 * GIB)
    assert "qlora" in {option.code for option in light}
    verdicts = [option.budget.verdict(80 * GIB) is Verdict.TOO_LARGE for option in found]
    assert verdicts == sorted(verdicts)


def test_zero3_is_no_way_for_packed_weights_or_one_card() -> None:
    packed = {option.code for option in options(make_budget(shape("internlm2-7b"), Setup(method="qlora")), GIB)}
    assert not packed & {"zero3", "offload"}
    two = deepspeed(method="full", world_size=2)
    assert {"zero3", "offload", "lora"} <= {
        option.code for option in options(make_budget(shape("internlm2-7b"), two), GIB)
    }


@pytest.mark.parametrize("free_gib", [24, 40, 80])
def test_fit_keeps_the_effective_batch_and_fits(free_gib: int) -> None:
    setup = Setup(method="qlora", batch_size=4, length=2048, accumulation=4)
    budget = make_budget(shape("internlm2-7b"), setup)
    best = fit(budget, free_gib * GIB)
    assert best is not None
    assert best.batch_size * best.accumulation == 16
    assert best.budget.verdict(free_gib * GIB) is Verdict.FITS
    larger = fit(budget, 200 * GIB)
    assert larger is not None
    assert larger.speed >= best.speed
    assert not larger.is_checkpointing


def test_with_the_speed_layer_the_least_need_counts() -> None:
    """It fills what is free: only what lowers its least need is a way."""
    setup = Setup(method="lora", batch_size=4, length=4096, accumulation=4, wish=Wish())
    budget = make_budget(shape("internlm2-7b"), setup, free_bytes=24 * GIB)
    found = {option.code: option for option in options(budget, 24 * GIB)}
    assert "checkpointing" not in found
    assert "attention" not in found
    assert saved_bytes(budget, found["qlora"]) > 8 * GIB
    assert budget.verdict(24 * GIB) is Verdict.TOO_LARGE
    assert found["qlora"].budget.verdict(24 * GIB) is not Verdict.TOO_LARGE


def test_nothing_fits_a_card_that_is_too_small() -> None:
    assert fit(make_budget(shape("internlm2-20b"), Setup(method="lora")), 24 * GIB) is None


def test_the_edits_make_the_config_what_was_promised(made: ConfigSource) -> None:
    """On our own config, and where a sequence-parallel factor stands below the variable."""
    source = made.set("batch_size", 2).set("max_length", 2048).set("model.use_activation_checkpointing", False)
    budget = read_budget(source, Start())
    for option in options(budget, GIB):
        if option.edit is not None:
            edited = read_budget(option.edit(source), Start())
            assert edited.setup == option.budget.setup or option.code in {"qlora", "rank"}, option.code
            assert edited.allocated_bytes == pytest.approx(option.budget.allocated_bytes, rel=0.02), option.code
    best = fit(budget, 80 * GIB)
    assert best is not None
    setup = read_setup(best.edit(source), Start())
    assert (setup.batch_size, setup.accumulation, setup.is_checkpointing) == (
        best.batch_size,
        best.accumulation,
        best.is_checkpointing,
    )
    doubled = ConfigSource(source.text.replace("sequence_parallel_size = 1", "sequence_parallel_size = 2"))
    again = fit(read_budget(doubled, Start()), 80 * GIB)
    assert again is not None
    assert again.edit(doubled).effective("accumulative_counts") * again.batch_size == 8 * 2
