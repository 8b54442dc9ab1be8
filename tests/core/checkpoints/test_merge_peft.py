"""The streaming merge against peft itself: every variant of LoRA that is not refused, tensor by tensor."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints.merge import merge_adapter
from core.checkpoints.verify import verify_merge
from core.errors import InputError
from core.runs.job import SilentProgress
from tests.core.checkpoints.adapters import (
    LINEAR,
    load,
    make_adapter,
    one_torch_thread,
    peft_merge,
    peft_model,
    read_model,
    steps_apart,
    write_tiny_gpt2,
)
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2

pytestmark = pytest.mark.engine
INTERNLM2 = ["wqkv", "wo", "w1", "w2", "w3", "output"]
WRITERS: dict[str, Callable[..., Path]] = {
    "llama": write_tiny_llama,
    "qwen2": write_tiny_qwen2,
    "internlm2": write_tiny_internlm2,
    "gpt2": write_tiny_gpt2,
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("llama", "float32", {}),
    "plain in bfloat16": ("llama", "bfloat16", {}),
    "plain in float16": ("qwen2", "float16", {}),
    "remote code": ("internlm2", "bfloat16", dict(target_modules=INTERNLM2)),
    "rsLoRA": ("llama", "bfloat16", dict(use_rslora=True, r=3)),
    "patterns": (
        "llama",
        "bfloat16",
        dict(
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            alpha_pattern={"q_proj": 3, "self_attn.k_proj": 32},
        ),
    ),
    "DoRA": ("llama", "bfloat16", dict(use_dora=True)),
    "DoRA, remote code": ("internlm2", "bfloat16", dict(use_dora=True, target_modules=INTERNLM2)),
    "DoRA on an embedding": ("llama", "bfloat16", dict(use_dora=True, target_modules=["q_proj", "embed_tokens"])),
    "DoRA, in × out": ("gpt2", "float32", dict(use_dora=True, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "all biases": ("qwen2", "bfloat16", dict(bias="all")),
    "biases of the LoRA layers": ("qwen2", "float32", dict(bias="lora_only", target_modules=["q_proj", "o_proj"])),
    "bias of lora_B": ("qwen2", "bfloat16", dict(lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "head saved whole": ("llama", "bfloat16", dict(modules_to_save=["lm_head"])),
    "head and embedding saved whole": ("llama", "bfloat16", dict(modules_to_save=["lm_head", "embed_tokens"])),
    "norm saved whole": ("internlm2", "bfloat16", dict(target_modules=["wqkv"], modules_to_save=["attention_norm"])),
    "LoRA on the embedding": ("llama", "bfloat16", dict(target_modules=["q_proj", "embed_tokens"])),
    "LoRA on embedding and head": ("internlm2", "float16", dict(target_modules=["wqkv", "tok_embeddings", "output"])),
    "in × out": ("gpt2", "float32", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "some layers": ("llama", "bfloat16", dict(layers_to_transform=[1])),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def torch_threads() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Base models, each written once; two shards each but GPT-2."""
    folder = tmp_path_factory.mktemp("bases")

    def base(kind: str, dtype: str) -> Path:
        target = folder / f"{kind}_{dtype}"
        return target if target.exists() else WRITERS[kind](target, dtype=dtype, shards=2)

    return base


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_peft(variant: str, bases: Callable[[str, str], Path], tmp_path: Path) -> None:
    kind, dtype, options = VARIANTS[variant]
    base = bases(kind, dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    result = merge_adapter(str(base), [str(adapter)], str(tmp_path / "merged"), progress=SilentProgress())
    found, expected = read_model(tmp_path / "merged"), peft_merge(base, adapter)
    assert result["changed"] > 0
    assert steps_apart(found, expected) <= 1
    assert {name for name, (_, bits) in found.items() if not np.array_equal(bits, read_model(base)[name][1])}
    figures = verify_merge(str(tmp_path / "merged"), method="layers", progress=SilentProgress())
    assert figures["passed"]


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing tied is touched": ({}, False),
    "LoRA on the embedding": (dict(target_modules=["q_proj", "embed_tokens"]), True),
    "LoRA on the head": (dict(target_modules=["q_proj", "lm_head"]), True),
    "head saved whole": (dict(modules_to_save=["lm_head"]), True),
    "embedding saved whole": (dict(modules_to_save=["embed_tokens"]), True),
    "both saved whole": (dict(modules_to_save=["embed_tokens", "lm_head"]), True),
}


@pytest.mark.parametrize("variant", TIED)
def test_tied_model_computes_what_was_trained(variant: str, bases: Callable[[str, str], Path], tmp_path: Path) -> None:
    """merge_and_unload writes into the tensor that both share; while training, only one of them had the update."""
    import torch

    options, unties = TIED[variant]
    base = bases("qwen2", "float32")
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merge_adapter(str(base), [str(adapter)], str(tmp_path / "merged"), progress=SilentProgress())
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode():
        trained = peft_model(base, adapter)(input_ids=ids).logits
        merged = load(tmp_path / "merged")(input_ids=ids).logits
    assert float((trained - merged).abs().max() / trained.std()) < 1e-5
    assert verify_merge(str(tmp_path / "merged"), method="logits", progress=SilentProgress())["passed"]
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is not unties
    assert ("lm_head.weight" in read_model(tmp_path / "merged")) is unties
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_model(tmp_path / "merged").keys()
    size = sum(bits.nbytes for _, bits in read_model(tmp_path / "merged").values())
    assert index["metadata"]["total_size"] == size


def test_several_adapters_are_peft_s_concatenation(bases: Callable[[str, str], Path], tmp_path: Path) -> None:
    base = bases("llama", "bfloat16")
    first = make_adapter(base, tmp_path / "first", seed=1)
    second = make_adapter(base, tmp_path / "second", seed=2, r=2, target_modules=["q_proj", "lm_head"], use_rslora=True)
    third = make_adapter(base, tmp_path / "third", seed=3, target_modules=LINEAR[:3])
    merge_adapter(
        str(base),
        [str(first), str(second), str(third)],
        str(tmp_path / "merged"),
        weights=[0.7, 0.25, 1.5],
        progress=SilentProgress(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(base, first)
        model.load_adapter(str(second), "second")
        model.load_adapter(str(third), "third")
        model.add_weighted_adapter(["default", "second", "third"], [0.7, 0.25, 1.5], "sum", combination_type="cat")
        model.set_adapter("sum")
        expected = {name: value.float().numpy() for name, value in model.merge_and_unload().state_dict().items()}
    found = read_model(tmp_path / "merged")
    assert steps_apart(found, expected) <= 1
    assert verify_merge(str(tmp_path / "merged"), method="layers", progress=SilentProgress())["passed"]
    recorded = json.loads((tmp_path / "merged/danlu.json").read_text())["adapters"]
    assert [item["weight"] for item in recorded] == [0.7, 0.25, 1.5]


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        (dict(init_lora_weights="pissa"), "init_lora_weights=pissa"),
        (dict(init_lora_weights="olora"), "init_lora_weights=olora"),
        (dict(target_parameters=["mlp.up_proj.weight"], target_modules=["q_proj"]), "target_parameters"),
        (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(
    options: dict[str, Any], feature: str, bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    base = bases("llama", "float32")
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(InputError) as caught:
        merge_adapter(str(base), [str(adapter)], str(tmp_path / "merged"), progress=SilentProgress())
    assert (caught.value.code, caught.value.params["feature"]) == ("checkpoints.unsupported_adapter", feature)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_logits_and_answers_of_the_merged_model_are_those_of_base_and_adapter(
    bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    base = bases("internlm2", "bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=INTERNLM2)
    merge_adapter(str(base), [str(adapter)], str(tmp_path / "merged"), progress=SilentProgress())
    figures = verify_merge(str(tmp_path / "merged"), method="logits", progress=SilentProgress())
    assert figures["passed"]
    assert figures["logit_error"] < figures["logit_tolerance"]
    assert figures["rounding_error"] > 0
    assert figures["top1_agreement"] > 0.9
    assert [answer["prompt"] for answer in figures["answers"]]
