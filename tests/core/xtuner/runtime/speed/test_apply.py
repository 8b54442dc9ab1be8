"""What the layer does to a built model: it takes over the loss, or leaves it as it is and says why; parts on and off."""

from collections.abc import Callable
from typing import Any

import pytest

from core.i18n import catalog
from core.messages import message
from tests.core.xtuner.runtime.speed.conftest import WRITERS, packed_batch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
Build = Callable[..., Any]


def give(model: Any, data: dict[str, Any], *, wish: Any = None, accumulation: int = 4, dtype: Any = None) -> Any:
    from core.xtuner.runtime.speed.apply import apply
    from core.xtuner.runtime.speed.parts import Reports, Wish

    wish = wish or Wish()
    reports = Reports(wish)
    applied = apply(model, dtype=dtype, wish=wish, reports=reports, batch=data, accumulation=accumulation)
    return applied, {
        report.name: (report.applied, catalog("en").say(report.note))
        for report in reports.finish(message("speed.left.no_fast_pass"))
    }


@pytest.mark.parametrize("family", WRITERS)
def test_the_model_takes_passes_and_still_takes_batches(build: Build, family: str) -> None:
    import torch

    from core.xtuner.runtime.speed.batches import flatten, without_bounds

    model = build(family, checkpointing=True)
    data = packed_batch([20, 12], seed=1)
    plain = without_bounds({"data": data})["data"]
    before = float(model(plain, mode="loss")["loss"])
    random = torch.get_rng_state()
    _, reports = give(model, data)
    assert torch.equal(random, torch.get_rng_state()), "the trial draws from nobody else's generator"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    losses = model(flatten([data], torch.device("cpu"), by_sample=False), 5, mode="loss")["loss"]
    assert abs(float(losses.sum()) - before) < 1e-4
    assert float(model(plain, mode="loss")["loss"]) == pytest.approx(before, abs=1e-6)
    assert reports["fast_pass"][0]
    for name in ("norm_kernel", "rotary_kernel", "swiglu_kernel"):
        assert (reports[name][0], "Triton" in reports[name][1]) == (False, True)


def test_in_16_bits_the_model_generates_as_before(build: Build) -> None:
    """The weights are cast once; generation, which runs without autocast, must still work and hardly move."""
    import torch

    model = build("qwen2")
    ids = torch.tensor([[5, 60, 70, 80, 90]])
    before = model.llm(ids).logits.detach()
    give(model, packed_batch([20], seed=1), dtype=torch.bfloat16)
    after = model.llm(ids).logits.detach()
    assert after.dtype == before.dtype
    assert float((after - before).norm() / before.norm()) < 0.02


def test_passes_as_large_as_asked_for(build: Build) -> None:
    from core.xtuner.runtime.speed.parts import ALL, GROUPED, Wish

    data = packed_batch([32], seed=1)
    applied, reports = give(build("llama"), data, wish=Wish(tokens_per_pass=100), accumulation=12)
    assert applied.tokens_per_pass == 96
    assert "3 micro-batches" in reports[GROUPED][1]
    applied, _ = give(build("llama"), data, wish=Wish(tokens_per_pass=64), accumulation=3)
    assert applied.tokens_per_pass == 32, "two micro-batches do not divide an accumulation of three"
    applied, reports = give(build("llama"), data, wish=Wish(frozenset(ALL) - {GROUPED}, 100), accumulation=12)
    assert applied.tokens_per_pass == 32
    assert reports[GROUPED] == (False, "not asked for")


def test_without_the_part_the_config_decides_about_recomputation(build: Build) -> None:
    from core.xtuner.runtime.speed.parts import ALL, RECOMPUTE, Wish

    wish = Wish(frozenset(ALL) - {RECOMPUTE})
    data = packed_batch([16], seed=1)
    for asked, layers in ((True, 2), (False, 0)):
        applied, _ = give(build("llama", checkpointing=asked), data, wish=wish)
        assert applied.fast_pass.options.recomputed_layers == layers
    applied, _ = give(build("llama", checkpointing=True), data)
    assert applied.fast_pass.options.recomputed_layers == 0


def test_a_pass_can_be_made_to_keep_less(build: Build) -> None:
    applied, _ = give(build("llama"), packed_batch([16], seed=1))
    assert applied.tighten()
    assert (applied.fast_pass.options.recomputed_layers, applied.fast_pass.options.block_tokens) == (2, 512)
    assert not applied.tighten(), "once is all there is"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_dora": True}, "LoRA variant"),
        ({"modules_to_save": ["embed_tokens"]}, "outside the adapters"),
        ({"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}}, "share rank"),
    ],
)
def test_adapters_it_does_not_know_are_left_alone(build: Build, change: dict[str, Any], why: str) -> None:
    from core.xtuner.runtime.speed.anatomy import UnsupportedModelError

    model = build("llama", **change)
    with pytest.raises(UnsupportedModelError, match=why):
        give(model, packed_batch([16], seed=1))
    assert "compute_loss" not in vars(model)


def test_a_model_without_adapter_is_left_alone(build: Build) -> None:
    from core.xtuner.runtime.speed.anatomy import UnsupportedModelError

    model = build("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.llm = model.llm.unload()
    with pytest.raises(UnsupportedModelError, match="no adapter"):
        give(model, packed_batch([16], seed=1))


def test_a_model_that_computes_differently_is_found_out(build: Build) -> None:
    """A variant with the same names and shapes but another formula must not be trained with ours."""
    from core.xtuner.runtime.speed.anatomy import UnsupportedModelError

    model = build("llama")
    for layer in model.llm.get_base_model().model.layers:
        layer.self_attn.scaling *= 3.0
    with pytest.raises(UnsupportedModelError, match="differs from XTuner's own"):
        give(model, packed_batch([24], seed=1))


def test_a_kernel_that_does_not_run_is_left_out(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.xtuner.runtime.speed import apply as room
    from core.xtuner.runtime.speed import decoder

    def broken(*_arguments: Any) -> bool:
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")

    model = build("llama")
    monkeypatch.setattr(room, "has_triton", lambda: True)
    monkeypatch.setattr(decoder, "uses_kernels", broken)
    _, reports = give(model, packed_batch([16], seed=1))
    assert reports["fast_pass"][0]
    assert "unsupported toolchain" in reports["norm_kernel"][1]
    assert "and more" not in reports["norm_kernel"][1]


def test_memory_decides_about_recomputation_and_size(build: Build) -> None:
    """Less memory: first more layers computed again and smaller blocks of logits, then nothing fits."""
    import torch

    from core.xtuner.runtime.speed.anatomy import read_decoder
    from core.xtuner.runtime.speed.memory import plan

    decoder = read_decoder(build("internlm2").llm)
    generous = plan(decoder, torch.bfloat16, 4096, 2**40)
    assert generous is not None
    assert (generous.recomputed_layers, generous.block_tokens) == (0, 4096)
    seen = []
    for share in (1.2, 0.9, 0.6, 0.4, 0.2, 0.05):
        found = plan(decoder, torch.bfloat16, 4096, int(generous.expected_bytes * share))
        seen.append(None if found is None else found.recomputed_layers)
        if found is not None:
            assert found.expected_bytes <= generous.expected_bytes * share
    assert seen[0] == 0
    assert seen[-1] is None
    numbers = [count for count in seen if count is not None]
    assert numbers == sorted(numbers)
