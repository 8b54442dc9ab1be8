"""The tokenizers of model folders as llama.cpp reads them, compared with the `gguf` package's own reading where it has one."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from gguf.vocab import SentencePieceVocab

from core.checkpoints.gguf_vocabulary import read_vocabulary
from core.errors import InputError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with bytes, control and user-defined pieces, as InternLM2's is."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small stove for large models", "丹炉 炼 大 模型", "what is your name"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        pad_id=3,
        user_defined_symbols=["<tool>"],
        control_symbols=["<turn>"],
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def copy_of(pieces: Path, folder: Path, **files: Any) -> Path:
    (folder / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    for name, value in files.items():
        write(folder, f"{name}.json", value)
    return folder


def test_pieces_scores_and_kinds_are_those_that_gguf_reads(pieces: Path) -> None:
    expected = list(SentencePieceVocab(pieces).all_tokens())
    found = read_vocabulary(pieces, len(expected))
    assert (found.model, found.rule) == ("llama", "default")
    assert [token.encode() for token in found.tokens] == [text for text, _, _ in expected]
    assert found.scores == [score for _, score, _ in expected]
    assert found.kinds == [kind for _, _, kind in expected]
    assert {1, 2, 3, 6} <= set(found.kinds)


def test_tokens_added_to_pieces_keep_their_ids_and_fill_gaps(pieces: Path, tmp_path: Path) -> None:
    size = len(list(SentencePieceVocab(pieces).all_tokens()))
    settings = {
        "added_tokens_decoder": {
            str(size + 2): {"content": "<|im_start|>", "special": True},
            str(size + 3): {"content": "<mark>", "special": False},
        },
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_start|>"},
    }
    found = read_vocabulary(
        copy_of(pieces, tmp_path, tokenizer_config=settings, added_tokens={"<extra>": size}), size + 6
    )
    assert found.tokens[size:] == [
        "<extra>",
        f"[PAD{size + 1}]",
        "<|im_start|>",
        "<mark>",
        f"[PAD{size + 4}]",
        f"[PAD{size + 5}]",
    ]
    assert found.kinds[size:] == [4, 5, 3, 4, 5, 5]
    assert len(found.scores) == len(found.tokens)
    assert found.special == {"bos": 1, "eos": size + 2}
    assert found.adds_bos


def test_a_text_starts_with_bos_only_where_the_tokenizer_says_so(pieces: Path, tmp_path: Path) -> None:
    size = len(list(SentencePieceVocab(pieces).all_tokens()))
    settings = {"bos_token": "<s>", "add_bos_token": False}
    assert not read_vocabulary(copy_of(pieces, tmp_path, tokenizer_config=settings), size).adds_bos
    assert not read_vocabulary(copy_of(pieces, tmp_path, tokenizer_config={"bos_token": "<none>"}), size).adds_bos


def test_a_model_smaller_than_its_tokenizer_is_refused(pieces: Path) -> None:
    with pytest.raises(InputError, match="gguf_tokenizer"):
        read_vocabulary(pieces, 100)


def byte_level(folder: Path, *steps: dict[str, Any], **model: Any) -> Path:
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    content = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], **model}
    added = [{"id": 3, "content": "<|end|>", "special": True}, {"id": 4, "content": "<call>", "special": False}]
    cutting = {"type": "Sequence", "pretokenizers": list(steps)} if len(steps) > 1 else steps[0]
    write(folder, "tokenizer.json", {"model": content, "added_tokens": added, "pre_tokenizer": cutting})
    return folder


def split(rule: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
        ([{"type": "ByteLevel"}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTE_LEVEL], "smollm"),
        ([split(WORDS + r"\p{N}" + REST), BYTE_LEVEL], "qwen2"),
        ([split(WORDS + r"\p{N}{1,3}" + REST), BYTE_LEVEL], "llama-bpe"),
    ],
)
def test_the_cutting_rule_goes_by_llama_cpp_s_name(tmp_path: Path, steps: list[dict[str, Any]], name: str) -> None:
    found = read_vocabulary(byte_level(tmp_path, *steps), 5)
    assert (found.model, found.rule) == ("gpt2", name)
    assert found.tokens == ["a", "b", "ab", "<|end|>", "<call>"]
    assert found.kinds == [1, 1, 1, 3, 4]
    assert found.merges == ["a b"]
    assert not found.adds_bos


@pytest.mark.parametrize(
    "steps",
    [
        [BYTE_LEVEL],
        [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL],
        [split(WORDS + r"\p{N}{1,2}" + REST), BYTE_LEVEL],
        [{"type": "Whitespace"}],
    ],
)
def test_a_rule_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="gguf_tokenizer"):
        read_vocabulary(byte_level(tmp_path, *steps), 5)


@pytest.mark.parametrize("model", [{"type": "Unigram"}, {"byte_fallback": True}, {"vocab": {"a": 0, "b": 7}}])
def test_a_tokenizer_of_another_kind_or_with_holes_is_refused(tmp_path: Path, model: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="gguf_tokenizer"):
        read_vocabulary(byte_level(tmp_path, {"type": "ByteLevel"}, **model), 5)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gguf_tokenizer"):
        read_vocabulary(tmp_path, 5)
