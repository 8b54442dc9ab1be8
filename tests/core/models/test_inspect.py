"""What a card says of a model folder, and what it says of a broken one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from core.models.inspect import fingerprint, inspect_model
from core.models.support import Level, support
from core.models.weights import BrokenHeader, read_header
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


def parameters(folder: Path) -> int:
    """Counted by the library that loads the weights."""
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            count += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return count


@pytest.mark.parametrize(
    ("write", "architecture", "is_tied", "needs_code"),
    [
        (write_tiny_llama, "LlamaForCausalLM", False, False),
        (write_tiny_qwen2, "Qwen2ForCausalLM", True, False),
        (write_tiny_internlm2, "InternLM2ForCausalLM", False, True),
    ],
)
def test_card_of_a_whole_model(
    tmp_path: Path, write: Callable[[Path], Path], architecture: str, is_tied: bool, needs_code: bool
):
    folder = write(tmp_path / "tiny-chat")
    card = inspect_model(folder)
    assert (card.architecture, card.is_tied, card.needs_remote_code) == (architecture, is_tied, needs_code)
    assert card.parameters == parameters(folder)
    assert (card.dtype, card.vocabulary_size, card.has_bos, card.is_chat) == ("float32", 512, True, True)
    assert card.context_length == 2048
    assert card.disk_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert card.problems == ()
    assert card.is_usable


def test_sharded_model_counts_all_shards_and_misses_none(tmp_path: Path):
    whole = inspect_model(write_tiny_llama(tmp_path / "whole"))
    folder = write_tiny_llama(tmp_path / "sharded", shards=2)
    card = inspect_model(folder)
    assert card.parameters == whole.parameters
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    [problem] = inspect_model(folder).problems
    assert problem.key == "models.problems.missing_shard"


def test_licence_comes_from_the_front_matter(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "tiny")
    assert inspect_model(folder).license is None
    (folder / "README.md").write_text("---\nlicense: 'apache-2.0'\n---\nlicense: other\n", encoding="utf-8")
    assert inspect_model(folder).license == "apache-2.0"
    (folder / "README.md").write_text("license: apache-2.0\n", encoding="utf-8")
    assert inspect_model(folder).license is None


@pytest.mark.parametrize(
    ("name", "has_template", "is_chat"),
    [
        ("llama-7b", False, False),
        ("llama-7b", True, True),
        ("internlm2-chat-1_8b", False, True),
        ("gemma-2b-it", False, True),
    ],
)
def test_chat_or_base(tmp_path: Path, name: str, has_template: bool, is_chat: bool):
    folder = write_tiny_llama(tmp_path / name)
    if not has_template:
        change(folder / "tokenizer_config.json", chat_template=None)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    card = inspect_model(folder)
    assert (card.has_chat_template, card.is_chat) == (has_template, is_chat)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-7])


def pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    (folder / "model.safetensors").write_text(text, encoding="ascii")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def no_bos(folder: Path) -> None:
    change(folder / "tokenizer_config.json", bos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def quantized(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})


def no_architecture(folder: Path) -> None:
    change(folder / "config.json", architectures=None)


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")


def missing_code(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_tiny.Tiny"})


PROBLEMS = {
    no_weights: "no_weights",
    cut_weights: "broken_file",
    pointer: "lfs_pointer",
    no_tokenizer: "no_tokenizer",
    no_bos: "no_bos",
    quantized: "quantized",
    no_architecture: "no_architecture",
    broken_index: "broken_index",
    missing_code: "missing_code",
}


@pytest.mark.parametrize(("spoil", "problem"), PROBLEMS.items(), ids=PROBLEMS.values())
def test_what_is_wrong_is_said(tmp_path: Path, spoil: Callable[[Path], None], problem: str):
    folder = write_tiny_llama(tmp_path / "tiny")
    spoil(folder)
    assert [found.key for found in inspect_model(folder).problems] == [f"models.problems.{problem}"]


def test_a_folder_that_is_no_model(tmp_path: Path):
    for folder, code in ((tmp_path / "gone", "models.not_a_folder"), (tmp_path, "models.no_config")):
        with pytest.raises(InputError) as caught:
            inspect_model(folder)
        assert caught.value.code == code
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError):
        inspect_model(tmp_path)


def test_fingerprint_changes_with_the_model_and_not_with_its_name(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    assert fingerprint(folder) == fingerprint(tmp_path / "b")
    change(tmp_path / "b/config.json", rope_theta=1.0)
    assert fingerprint(folder) != fingerprint(tmp_path / "b")
    assert fingerprint(folder) != fingerprint(write_tiny_qwen2(tmp_path / "c"))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_crash_the_header_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    file = tmp_path_factory.mktemp("header") / "model.safetensors"
    file.write_bytes(content)
    try:
        header = read_header(file)
    except BrokenHeader:
        return
    assert isinstance(header, dict)


@pytest.mark.parametrize("header", ["[]", "7", '{"a": 1}', '{"a": {"data_offsets": "x"}}', '{"a": {"shape": [1]}}'])
def test_odd_headers_are_broken(tmp_path: Path, header: str):
    folder = write_tiny_llama(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert [problem.key for problem in inspect_model(folder).problems] == ["models.problems.broken_file"]


@pytest.mark.parametrize(
    ("values", "level", "lacks"),
    [
        ({}, Level.TUNED, []),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, Level.PLAIN, []),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, Level.UNSUPPORTED, ["not_causal"]),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, Level.UNSUPPORTED, ["not_causal"]),
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, Level.UNSUPPORTED, ["unknown_architecture"]),
        (
            {"architectures": ["NewForCausalLM"], "model_type": "new", "auto_map": {"AutoModelForCausalLM": "a.B"}},
            Level.PLAIN,
            ["remote_code"],
        ),
    ],
    ids=["llama", "qwen3", "bert", "t5", "unknown", "own_code"],
)
def test_what_xtuner_makes_of_it(tmp_path: Path, values: dict[str, Any], level: Level, lacks: list[str]):
    folder = write_tiny_llama(tmp_path / "tiny")
    change(folder / "config.json", **values)
    found = support(inspect_model(folder))
    assert found.level is level
    assert found.template == "qwen_chat"
    assert [lack.key.rsplit(".", 1)[-1] for lack in found.lacks] == lacks


def test_levels_agree_with_the_installed_transformers():
    """The table read from source is the one that transformers itself uses."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from core.models.support import _CAUSAL, _pairs

    assert _pairs(*_CAUSAL) == {key: str(value) for key, value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
