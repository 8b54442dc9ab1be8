"""GGUF files read back by transformers' own reader and by the gguf package: same logits, same tokens, bounded error when quantised."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints.gguf_export import KINDS, export_gguf
from core.checkpoints.gguf_layout import read_sizes, rope_factors
from core.checkpoints.gguf_vocabulary import read_vocabulary
from core.checkpoints.kquants import quantize_q4_k, quantize_q6_k
from core.errors import InputError
from core.runs.job import SilentProgress
from tests.core.checkpoints.adapters import load, write_tiny_gpt2
from tests.models import HIDDEN, VOCABULARY, write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2

WRITERS: dict[str, Callable[..., Path]] = {
    "llama": write_tiny_llama,
    "qwen2": write_tiny_qwen2,
    "internlm2": write_tiny_internlm2,
}
TEMPLATE = {
    "name": "qwen_chat",
    "SYSTEM": "<|im_start|>system\n{system}<|im_end|>\n",
    "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "SUFFIX": "<|im_end|>",
    "SUFFIX_AS_EOS": True,
    "SEP": "\n",
    "STOP_WORDS": ["<|im_end|>", "<|endoftext|>"],
}


def export(base: Path, folder: Path, kind: str = "f16") -> Path:
    result = export_gguf(str(base), str(folder), kind=kind, progress=SilentProgress())
    assert (folder / result["file"]).stat().st_size == result["size_bytes"]
    return folder / result["file"]


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.engine
@pytest.mark.parametrize("name", WRITERS)
def test_f16_file_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = WRITERS[name](tmp_path / "tiny", dtype="float16", shards=2)
    file = export(base, tmp_path / "gguf")
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, torch_dtype=torch.float32)
        expected, found = load(base)(input_ids=ids).logits, read.eval()(input_ids=ids).logits
    assert read.config.tie_word_embeddings is (name == "qwen2")
    # float16 weights are exact in the file; only the order of sums differs.
    assert float((expected - found).abs().max() / expected.std()) < 1e-4


@pytest.mark.engine
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_as_near_as_its_bits_allow(kind: str, tmp_path: Path) -> None:
    from gguf import GGUFReader, quants

    base = write_tiny_llama(tmp_path / "tiny", layers=3)
    exact = {
        t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(export(base, tmp_path / "f16")).tensors
    }
    file = export(base, tmp_path / "out", kind) if kind != "f16" else tmp_path / "f16/tiny-f16.gguf"
    for tensor in GGUFReader(file).tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        error = np.linalg.norm(values - exact[tensor.name]) / np.linalg.norm(exact[tensor.name])
        # Rows of 64 are too short for groups of 256, so q4_k_m falls back to q8_0 here; its own arithmetic is tested below.
        assert error < (0.01 if kind != "f16" else 1e-9), tensor.name
    assert fields(file)["general.file_type"] == {"f16": 1, "q8_0": 7, "q4_k_m": 15}[kind]


def test_q8_0_takes_about_half_of_f16(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "tiny")
    sizes = {kind: export(base, tmp_path / kind, kind).stat().st_size for kind in ("f16", "q8_0")}
    assert sizes["q8_0"] < 0.65 * sizes["f16"]


@pytest.mark.parametrize(
    ("quantize", "name", "bytes_a_group", "allowed"),
    [(quantize_q4_k, "Q4_K", 144, 0.08), (quantize_q6_k, "Q6_K", 210, 0.02)],
)
def test_k_quants_are_read_back_by_the_gguf_package(
    quantize: Any, name: str, bytes_a_group: int, allowed: float
) -> None:
    from gguf import GGMLQuantizationType, quants

    random = np.random.default_rng(0)
    kind = GGMLQuantizationType[name]
    for spread in (1e-3, 0.02, 5.0):
        values = (random.standard_normal((16, 1024)) * spread).astype(np.float32)
        packed = quantize(values)
        assert packed.shape == (16, 4 * bytes_a_group)
        assert np.linalg.norm(quants.dequantize(packed, kind) - values) < allowed * np.linalg.norm(values)
    shifted = (random.random((4, 256)) * 0.1 + 0.5).astype(np.float32)
    assert np.abs(quants.dequantize(quantize(shifted), kind) - shifted).max() < 0.06
    assert not quants.dequantize(quantize(np.zeros((2, 256), np.float32)), kind).any()
    largest = np.array([[-3.0, *[0.25] * 255]], np.float32)
    assert abs(quants.dequantize(quantize(largest), kind)[0, 0] + 3.0) < 0.15


def test_q4_k_is_better_than_the_plain_range(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quants

    values = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    found = quants.dequantize(quantize_q4_k(values), GGMLQuantizationType.Q4_K)
    parts = values.reshape(-1, 32)
    low, span = parts.min(axis=1, keepdims=True), np.ptp(parts, axis=1, keepdims=True)
    plain = (np.rint((parts - low) / span * 15) / 15 * span + low).reshape(values.shape)
    assert np.linalg.norm(found - values) < 1.02 * np.linalg.norm(plain - values)


def test_tokenizer_and_template_are_in_the_file(tmp_path: Path) -> None:
    base = write_tiny_qwen2(tmp_path / "tiny")
    found = fields(export(base, tmp_path / "gguf"))
    content = json.loads((base / "tokenizer.json").read_text())
    tokens = found["tokenizer.ggml.tokens"]
    assert {text: number for number, text in enumerate(tokens)} == content["model"]["vocab"]
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in content["model"]["merges"]]
    assert [number for number, kind in enumerate(found["tokenizer.ggml.token_type"]) if kind == 3] == [0, 1, 2, 3, 4]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert found["tokenizer.chat_template"] == settings["chat_template"]
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["qwen2.embedding_length"] == HIDDEN


def test_embedding_larger_than_the_vocabulary_is_filled_up(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(write_tiny_llama(tmp_path / "tiny"), VOCABULARY + 3)
    assert vocabulary.tokens[-3:] == [f"[PAD{VOCABULARY + n}]" for n in range(3)]
    assert vocabulary.kinds[-3:] == [5, 5, 5]


def test_modelfile_carries_template_system_and_stops(tmp_path: Path) -> None:
    base = write_tiny_qwen2(tmp_path / "tiny")
    (base / "danlu.json").write_text(json.dumps({"prompt_template": TEMPLATE, "system": "You are Danlu."}))
    text = (export(base, tmp_path / "gguf").parent / "Modelfile").read_text()
    assert text.startswith("FROM ./tiny-f16.gguf\n")
    assert '{{ "<|im_start|>user\\n" }}{{ $message.Content }}' in text
    assert 'SYSTEM """You are Danlu."""' in text
    assert [line for line in text.splitlines() if "stop" in line] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "</s>"',
    ]


def code_of(base: Path, target: Path) -> str:
    with pytest.raises(InputError) as caught:
        export_gguf(str(base), str(target), progress=SilentProgress())
    assert not target.exists()
    return caught.value.code


def test_what_would_load_and_answer_wrongly_is_refused(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "tiny")
    config = json.loads((base / "config.json").read_text())

    def with_config(**changes: Any) -> str:
        (base / "config.json").write_text(json.dumps({**config, **changes}))
        return code_of(base, tmp_path / "gguf")

    assert with_config(model_type="baichuan") == "checkpoints.gguf_architecture"
    assert with_config(rope_scaling={"rope_type": "longrope"}) == "checkpoints.gguf_rope"
    assert with_config(quantization_config={"quant_method": "gptq"}) == "checkpoints.quantized_base"
    assert with_config(model_type="mistral", sliding_window=4096) == "checkpoints.gguf_architecture"
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert code_of(base, tmp_path / "gguf") == "checkpoints.gguf_tokenizer"


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    base = write_tiny_gpt2(tmp_path / "tiny")
    config = json.loads((write_tiny_llama(tmp_path / "llama") / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config))
    assert code_of(base, tmp_path / "gguf") == "checkpoints.gguf_tensor"


def test_llama3_rope_factors_are_transformers_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_theta=500000.0, rope_scaling=scaling)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain, _ = ROPE_INIT_FUNCTIONS["default"](config, "cpu")
    factors = rope_factors(config.to_dict(), read_sizes(config.to_dict()))
    assert factors is not None
    assert np.allclose(factors, (plain / stretched).numpy(), rtol=1e-5)
