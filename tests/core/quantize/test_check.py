"""The check of 4-bit weights: it finds the rounding, sees through AWQ's factors, and finds what is wrong."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.checkpoints.shards import read_folder
from core.errors import JobError
from core.quantize.check import check_quantized, unpack
from core.runs.job import SilentProgress
from tests import models
from tests.core.quantize.packed import write_packed
from tests.models import write_tiny_llama, write_tiny_qwen2

Values = dict[str, NDArray[np.float32]]
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "base", dtype="bfloat16", shards=2)


def check(base: Path, made: Path, *, is_scaled: bool = False) -> dict[str, object]:
    return check_quantized(base, made, is_scaled=is_scaled, progress=SilentProgress())


def scale_like_awq(values: Values) -> None:
    """Larger inputs of attention, MLP and down_proj; what comes before is as much smaller. The model computes what it did."""
    random = np.random.default_rng(7)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for norm, modules in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            factors = random.uniform(0.5, 2.0, 64).astype(np.float32)
            values[f"{prefix}.{norm}.weight"] /= factors
            for module in modules:
                values[f"{prefix}.{module}.weight"] *= factors
        factors = random.uniform(0.5, 2.0, 128).astype(np.float32)
        values[f"{prefix}.mlp.up_proj.weight"] /= factors[:, None]
        values[f"{prefix}.mlp.down_proj.weight"] *= factors


def test_rounding_to_the_nearest_costs_what_it_must(base: Path, tmp_path: Path) -> None:
    found = check(base, write_packed(base, tmp_path / "made"))
    assert (found["matrices"], found["kept"]) == (14, 7)
    # Numbers with a normal spread, 64 a group: the largest is about 2.4 spreads, so a step is a third of one.
    assert 0.08 < float(str(found["weight_error"])) < 0.12
    assert float(str(found["worst_error"])) < 0.13


def test_factors_of_awq_are_found_and_taken_out(base: Path, tmp_path: Path) -> None:
    made = write_packed(base, tmp_path / "made", scale_like_awq)
    assert float(str(check(base, made, is_scaled=True)["worst_error"])) < 0.2
    with pytest.raises(JobError) as caught:
        check(base, made)
    assert caught.value.code == "quantize.wrong_tensors"


def test_without_grouped_heads_factors_between_values_and_output_are_taken_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "KV_HEADS", models.HEADS)
    base = write_tiny_llama(tmp_path / "base", dtype="bfloat16")

    def scale(values: Values) -> None:
        scale_like_awq(values)
        factors = np.linspace(0.4, 3.0, 64, dtype=np.float32)
        values[f"{LAYER}.self_attn.v_proj.weight"] /= factors[:, None]
        values[f"{LAYER}.self_attn.o_proj.weight"] *= factors

    made = write_packed(base, tmp_path / "made", scale)
    assert float(str(check(base, made, is_scaled=True)["worst_error"])) < 0.3


def test_factors_that_do_not_cancel_are_found(base: Path, tmp_path: Path) -> None:
    def forget(values: Values) -> None:
        scale_like_awq(values)
        values[f"{LAYER}.mlp.down_proj.weight"] *= np.linspace(0.2, 5.0, 128, dtype=np.float32)

    with pytest.raises(JobError) as caught:
        check(base, write_packed(base, tmp_path / "made", forget), is_scaled=True)
    assert caught.value.params["name"] == f"{LAYER}.mlp.down_proj.weight"


def shuffle_rows(values: Values) -> None:
    values[f"{LAYER}.self_attn.q_proj.weight"] = values[f"{LAYER}.self_attn.q_proj.weight"][::-1].copy()


def drop_norm(values: Values) -> None:
    del values["model.norm.weight"]


def break_norm(values: Values) -> None:
    values["model.norm.weight"][3] = np.nan


def cut_rows(values: Values) -> None:
    values[f"{LAYER}.mlp.up_proj.weight"] = values[f"{LAYER}.mlp.up_proj.weight"][:100]


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        (shuffle_rows, "wrong_weights", f"{LAYER}.self_attn.q_proj.weight"),
        (drop_norm, "wrong_tensors", "model.norm.weight"),
        (break_norm, "wrong_tensors", "model.norm.weight"),
        (cut_rows, "wrong_tensors", f"{LAYER}.mlp.up_proj.weight_packed"),
    ],
)
def test_what_is_wrong_is_named(base: Path, tmp_path: Path, change, code: str, name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(JobError) as caught:
        check(base, write_packed(base, tmp_path / "made", change))
    assert (caught.value.code, caught.value.params["name"]) == (f"quantize.{code}", name)


def test_a_tied_head_may_be_missing_and_a_changed_embedding_may_not(tmp_path: Path) -> None:
    base = write_tiny_qwen2(tmp_path / "base", dtype="float16")
    made = write_packed(base, tmp_path / "made")
    assert check(base, made)["matrices"] == 14

    def change(values: Values) -> None:
        values["model.embed_tokens.weight"][0, 0] += 1

    with pytest.raises(JobError) as caught:
        check(base, write_packed(base, tmp_path / "other", change))
    assert caught.value.params["name"] == "model.embed_tokens.weight"
    assert read_folder(made)[0].tensors["model.layers.0.self_attn.q_proj.weight_packed"].dtype == "I32"


@given(st.lists(st.integers(-8, 7), min_size=32, max_size=32), st.floats(0.0625, 8, width=32))
def test_numbers_come_back_from_their_bits(numbers: list[int], scale: float) -> None:
    bits = sum((number + 8) << (4 * place) for place, number in enumerate(numbers))
    packed = np.frombuffer(bits.to_bytes(16, "little"), dtype="<i4").reshape(1, 4)
    scales = np.array([[scale]], dtype=np.float32)
    assert np.array_equal(unpack(packed, scales, 32)[0], np.array(numbers, dtype=np.float32) * scales[0])
