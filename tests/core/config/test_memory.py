"""The memory budget against what an H100 took, against dry runs on fake tensors, and against the speed layer's own plan."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.config.facts import ModelFacts
from core.config.memory import formula
from core.config.memory.budget import Verdict, make_budget, read_budget
from core.config.memory.fast import fast_peak, plan
from core.config.memory.moments import Moment, Part, peak
from core.config.memory.setup import Attention, Engine, Setup, Start, read_setup
from core.config.memory.shape import read_shape, shape_of
from core.config.source import ConfigSource
from core.config.values import Code
from core.errors import InputError
from core.xtuner.runtime.speed.parts import FAST_PASS, Wish
from tests.core.config.memory_cases import DEEPSPEED_0_16_ON_H100, DRY_RUNS, XTUNER_ON_H100, Measured, deepspeed, shape
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(("model", "mib", "options"), XTUNER_ON_H100)
def test_measured_on_an_h100_under_xtuners_runner(model: str, mib: int, options: dict[str, Any]) -> None:
    setup = deepspeed(**options) if "engine" in options else Setup(engine=Engine.AMP, accumulation=2, **options)
    assert peak(shape(model), setup).total / MIB == pytest.approx(mib, rel=0.003)


@pytest.mark.parametrize("case", DEEPSPEED_0_16_ON_H100, ids=str)
def test_measured_on_an_h100_with_an_older_deepspeed(case: Measured) -> None:
    allowed = 0.05 if case.setup["method"] == "full" else 0.03
    assert peak_of_0_16(case.model, deepspeed(**case.setup)) / MIB == pytest.approx(case.mib, rel=allowed)


def peak_of_0_16(model: str, setup: Setup) -> float:
    """DeepSpeed 0.16 made its buckets before the backward pass, and kept a micro-step's gradients beside the accumulated ones."""
    counts, moments = formula.count(shape(model), setup), peak(shape(model), setup).moments
    loss = moments[Moment.LOSS] + formula.buckets(setup, counts)
    layer = moments[Moment.LAYER] + 2 * counts.trained / setup.world_size
    return max(moments[Moment.FORWARD], loss, layer, moments[Moment.STEP])


def test_the_guides_20b_on_two_cards() -> None:
    """nvidia-smi showed 59,119 MiB on each of two A100s, with the DeepSpeed of 2024. Eager attention would be far above it."""
    guide = deepspeed(method="qlora", batch_size=4, length=4096, accumulation=16, world_size=2)
    budget = make_budget(shape("internlm2-20b"), guide)
    assert peak_of_0_16("internlm2-20b", guide) / MIB == pytest.approx(43515, rel=0.01)
    assert budget.allocated_bytes / MIB == pytest.approx(43515 - 1907, rel=0.01)
    low, high = (size / MIB for size in budget.shown_bytes)
    assert low < 59119 < high
    eager = make_budget(shape("internlm2-20b"), replace(guide, attention=Attention.EAGER))
    assert eager.allocated_bytes / MIB > 59119
    assert [doubt.key for doubt in budget.doubts] == ["budget.doubts.no_headers", "budget.doubts.several_ranks"]
    assert budget.verdict(80 * GIB) is Verdict.FITS
    assert budget.verdict(40 * GIB) is Verdict.TOO_LARGE


@pytest.mark.parametrize(("model", "mib", "options"), DRY_RUNS)
def test_dry_runs_under_autocast(model: str, mib: int, options: dict[str, Any]) -> None:
    setup = Setup(engine=Engine.AMP, accumulation=4, **options)
    worst, counts = peak(shape(model), setup), formula.count(shape(model), setup)
    held = formula.static(setup, counts).total + formula.workspace()
    beyond = max(worst.moments[moment] for moment in (Moment.FORWARD, Moment.LOSS, Moment.LAYER)) - held
    assert beyond / MIB == pytest.approx(mib, rel=0.012)


def test_trained_parameters_are_those_of_peft() -> None:
    """68,968,448 for InternLM2-1.8B at rank 64, its head `output` included; 295,723,008 for 20B."""
    assert formula.count(shape("internlm2-1.8b"), Setup(method="lora")).trained == 68_968_448
    assert formula.count(shape("internlm2-20b"), Setup(method="qlora")).trained == 295_723_008
    named = Setup(method="lora", targets=("wqkv", "wo"))
    assert formula.count(shape("internlm2-1.8b"), named).trained == 64 * 24 * (2048 + 4096 + 2048 + 2048)
    assert formula.count(shape("llama3-8b"), Setup(method="lora")).trained == 167_772_160


@pytest.mark.parametrize("write", [write_tiny_internlm2, write_tiny_qwen2, write_tiny_llama])
def test_a_shape_from_headers_is_the_one_from_the_config(tmp_path: Path, write: Any) -> None:
    import json

    folder = write(tmp_path / "model", shards=2)
    found = read_shape(folder)
    described = shape_of(json.loads((folder / "config.json").read_text()))
    assert found.is_from_headers
    assert not described.is_from_headers
    assert sorted(found.matrices, key=str) == sorted(described.matrices, key=str)
    assert (found.is_tied, found.head_name) == (described.is_tied, described.head_name)
    assert found.parameters - described.parameters in (0, 2 * (64 + 32 + 32))  # Qwen2's biases


def test_broken_weights_leave_the_config(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not a header at all")
    assert not read_shape(folder).is_from_headers
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(InputError, match=r"budget\.no_shape") as caught:
        read_shape(folder)
    assert caught.value.params["lacking"] == "num_hidden_layers"


def test_a_mixture_of_experts_is_doubted() -> None:
    mixture = shape_of({**CONFIG, "model_type": "mixtral"})
    budget = make_budget(mixture, Setup())
    assert "budget.doubts.unknown_model" in [doubt.key for doubt in budget.doubts]
    known = make_budget(shape_of(CONFIG), Setup())
    assert budget.shown_bytes[1] > known.shown_bytes[1]


CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 688,
    "vocab_size": 4000,
}


def test_the_setup_of_the_guides_config(shipped: ConfigSource) -> None:
    start = Start(world_size=2, deepspeed="deepspeed_zero2")
    setup = read_setup(shipped, start, model_type="internlm2")
    assert setup == Setup(
        method="qlora",
        batch_size=1,
        length=2048,
        accumulation=16,
        attention=Attention.SDPA,
        rank=64,
        dropout=0.1,
        engine=Engine.DEEPSPEED,
        weights="float16",
        world_size=2,
        stage=2,
    )
    bare = Start(deepspeed="deepspeed_zero3_offload", is_patched=False)
    changed = (
        shipped.delete("model.lora")
        .set("model.llm.quantization_config", None)
        .set("accumulative_counts", 4)
        .set("model.use_activation_checkpointing", False)
        .set("model.llm.torch_dtype", Code("torch.bfloat16"))
    )
    setup = read_setup(changed, bare, model_type="internlm2")
    assert (setup.method, setup.stage, setup.is_offloaded) == ("full", 3, True)
    assert (setup.attention, setup.is_checkpointing, setup.weights) == (Attention.EAGER, False, "bfloat16")
    assert read_setup(changed, Start(has_flash_attention=True)).attention is Attention.FLASH


def test_zero_shares_out_what_it_says() -> None:
    """Rajbhandari et al., figure 1: stage 1 divides optimizer states, stage 2 gradients too, stage 3 weights too."""
    model = shape("internlm2-1.8b")

    def held(stage: int, ranks: int, **options: Any) -> formula.Static:
        setup = deepspeed(method="full", stage=stage, world_size=ranks, **options)
        return formula.static(setup, formula.count(model, setup))

    one, first, second = held(2, 1), held(1, 4), held(2, 4)
    assert first.optimizer == one.optimizer / 4
    assert (first.gradients, second.gradients) == (one.gradients, one.gradients / 4)
    assert second.weights == one.weights == 2 * model.parameters
    assert held(3, 4).weights < one.weights + 2e9
    assert held(2, 1, is_offloaded=True).optimizer == 0


def test_eager_attention_grows_with_the_square_of_the_length() -> None:
    model = shape("internlm2-7b")
    sizes = [peak(model, Setup(method="qlora", length=n, attention=Attention.EAGER)).total for n in (4096, 8192, 16384)]
    flat = [peak(model, Setup(method="qlora", length=n)).total for n in (4096, 8192, 16384)]
    assert sizes[2] - sizes[1] > 3 * (sizes[1] - sizes[0])
    assert flat[2] - flat[1] < 2.1 * (flat[1] - flat[0])


def test_parts_add_up_to_the_peak() -> None:
    for options in ({"method": "lora"}, {"method": "full", "accumulation": 1}, {"method": "qlora", "batch_size": 4}):
        worst = peak(shape("internlm2-1.8b"), Setup(**options))  # type: ignore[arg-type]
        assert sum(worst.parts.values()) == pytest.approx(worst.total, abs=8)
        assert worst.total == max(worst.moments.values())


def fake_decoder(hidden: int, layers: int, width: int, rank: int, *, packed: bool) -> Any:
    """What the speed layer's plan reads of a built model: 8 heads of 32, 2 of keys, vocabulary 4000."""

    def group(outputs: int, inputs: int, count: int) -> Any:
        weight = SimpleNamespace(spans=[(0, outputs)], elements=outputs * inputs, packed=packed)
        return SimpleNamespace(weight=weight, count=count, rank=rank)

    import torch

    projection, output = group(12 * 32, hidden, 3), group(hidden, hidden, 1)
    gate_up, down = group(2 * width, hidden, 2), group(hidden, width, 1)
    layer = SimpleNamespace(gate_up=gate_up, groups=(projection, output, gate_up, down))
    head = SimpleNamespace(weight=SimpleNamespace(spans=[(0, 4000)], elements=4000 * hidden, packed=False))
    trained = rank * layers * (3 * hidden + 12 * 32 + 2 * hidden + 2 * (hidden + width) + (hidden + width))
    return SimpleNamespace(
        config=SimpleNamespace(hidden_size=hidden),
        heads=8,
        kv_heads=2,
        dim=32,
        layers=(layer,) * layers,
        groups=(projection, output, gate_up, down, head),
        head=head,
        embedding=SimpleNamespace(get_parameter=lambda _name: torch.empty(0, dtype=torch.float32)),
        parameters=[SimpleNamespace(numel=lambda: trained)],
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("free_mib", [40, 80, 160, 320, 4000])
def test_the_speed_layer_plans_the_same(method: str, free_mib: int) -> None:
    import torch

    from core.xtuner.runtime.speed import memory

    decoder = fake_decoder(256, 4, 688, 8, packed=method == "qlora")
    setup = Setup(method=method, rank=8, length=512, accumulation=8)
    model = shape_of(CONFIG)
    counts = formula.count(model, setup)
    assert counts.trained == decoder.parameters[0].numel()
    for tokens in (512, 2048):
        theirs = memory.plan(decoder, torch.bfloat16, tokens, free_mib * MIB)
        ours = plan(model, setup, counts, tokens, free_mib * MIB)
        assert (theirs is None) == (ours is None)
        if theirs is not None and ours is not None:
            assert (ours.expected_bytes, ours.recomputed_layers, ours.block_tokens) == (
                theirs.expected_bytes,
                theirs.recomputed_layers,
                theirs.block_tokens,
            )


def test_the_speed_layer_uses_what_is_free() -> None:
    model, setup = shape("internlm2-7b"), Setup(method="qlora", length=2048, accumulation=16, wish=Wish())
    counts = formula.count(model, setup)
    small, large = (fast_peak(model, setup, counts, free * GIB) for free in (12, 80))
    assert small.least == large.least
    assert small.settled < large.settled <= 80 * GIB
    assert (small.recomputed_layers, large.recomputed_layers) == (32, 0) or small.tokens < large.tokens
    budget = make_budget(model, setup, free_bytes=80 * GIB)
    assert budget.fast is not None
    assert sum(budget.parts.values()) == pytest.approx(budget.fast.settled, abs=8)
    assert budget.verdict(80 * GIB) is Verdict.FITS
    one = fast_peak(model, replace(setup, wish=Wish(frozenset({FAST_PASS}))), counts, 80 * GIB)
    assert (one.tokens, one.recomputed_layers) == (2048, 32)
    tuned = fast_peak(model, replace(setup, wish=Wish(tokens_per_pass=4096)), counts, 80 * GIB)
    assert tuned.tokens == 4096
    limited = fast_peak(model, replace(setup, wish=Wish(memory_limit_bytes=12 * GIB)), counts, 80 * GIB)
    assert limited == small
    assert make_budget(model, setup, free_bytes=4 * GIB).verdict(4 * GIB) is Verdict.TOO_LARGE


def test_what_the_speed_layer_cannot_take_is_budgeted_as_stock() -> None:
    full = make_budget(shape("internlm2-1.8b"), Setup(method="full", wish=Wish()))
    shared = make_budget(shape("internlm2-1.8b"), deepspeed(method="lora", stage=3, wish=Wish()))
    assert full.fast is None
    assert shared.fast is None


@pytest.mark.parametrize(
    ("setup", "measured_gib"),
    [
        (Setup(), 11.01),
        (Setup(world_size=2), 11.27),
        (Setup(wish=Wish()), 31.93),
        (Setup(wish=Wish(), world_size=2), 31.93),
        (Setup(method="qlora"), 6.11),
        (Setup(method="qlora", wish=Wish()), 32.65),
        (deepspeed(method="lora", world_size=2), 6.60),
        (deepspeed(method="lora", world_size=2, wish=Wish()), 29.67),
        (deepspeed(method="lora", world_size=2, stage=1, wish=Wish()), 29.67),
        (deepspeed(method="qlora", world_size=2, wish=Wish()), 30.39),
        (deepspeed(method="lora", world_size=2, stage=3), 7.64),
        (deepspeed(method="full", world_size=2, stage=3), 22.11),
    ],
)
def test_what_one_and_two_cards_took(setup: Setup, measured_gib: float) -> None:
    """Peak allocated of rank 0 on H100s of 80 GB, `python -m benchmarks.multigpu`: InternLM2-1.8B, 2048 tokens, 16 micro-batches a step."""
    setup = replace(setup, accumulation=16 // setup.world_size)
    budget = make_budget(shape("internlm2-1.8b"), setup, free_bytes=79 * GIB)
    assert budget.allocated_bytes / GIB == pytest.approx(measured_gib, rel=0.055)


def test_deepspeeds_buckets_are_kept_free_for_it() -> None:
    model, setup = shape("internlm2-1.8b"), deepspeed(method="lora", length=2048, accumulation=16, wish=Wish())
    counts = formula.count(model, setup)
    tight, lean = (
        fast_peak(model, replace(setup, bucket_elements=size), counts, 20 * GIB) for size in (500_000_000, 1000)
    )
    assert tight.least - lean.least == pytest.approx(2 * 2 * 500_000_000, rel=1e-3)
    assert tight.settled <= 20 * GIB
    assert lean.tokens >= tight.tokens


def test_the_budget_of_a_config(made: ConfigSource, qwen2: ModelFacts) -> None:
    budget = read_budget(made, Start())
    assert budget.shape == read_shape(qwen2.path)
    assert set(budget.parts) >= {Part.WEIGHTS, Part.ADAPTERS, Part.OPTIMIZER, Part.GRADIENTS, Part.ACTIVATIONS}
    assert budget.doubts == ()
    doubled = read_budget(made, Start(), correction=2.0)
    assert doubled.allocated_bytes == pytest.approx(2 * budget.allocated_bytes, abs=2)
    with pytest.raises(InputError, match=r"budget\.no_model"):
        read_budget(made.set("pretrained_model_name_or_path", "internlm/some-hub-name"), Start())
