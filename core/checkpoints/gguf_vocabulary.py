"""The tokenizer of a model folder as llama.cpp reads it: tokens, scores, kinds, merges, and how text is cut before the merges.

llama.cpp knows a byte-level tokenizer by the name of its cutting rule. The rule in tokenizer.json is compared with the known ones; another
one is refused, because the file would load and answer with wrong tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.errors import InputError
from core.files import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""gguf.TokenType."""
_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_RULES: Final = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
_ROLES: Final = ("bos", "eos", "unk", "pad")


@dataclass(slots=True)
class Vocabulary:
    """What goes into the file."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece)."""
    rule: str
    """llama.cpp's name of the cutting rule."""
    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    """Role (bos, eos, unk, pad) → id."""
    adds_bos: bool = False


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer in `folder`, filled up to `size` tokens. Raises InputError `checkpoints.gguf_tokenizer`."""
    settings = _optional(folder / "tokenizer_config.json")
    if (folder / "tokenizer.model").is_file():
        found = _sentencepiece(folder)
    elif (folder / "tokenizer.json").is_file():
        found = _byte_level(folder)
    else:
        raise InputError("checkpoints.gguf_tokenizer", path=str(folder), reason="tokenizer.json")
    for text, number in _optional(folder / "added_tokens.json").items():
        _put(found, int(number), text, _USER_DEFINED)
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        _put(found, int(number), entry["content"], _CONTROL if entry.get("special") else _USER_DEFINED)
    if len(found.tokens) > size:
        raise InputError("checkpoints.gguf_tokenizer", path=str(folder), reason=f"{len(found.tokens)} > {size}")
    while len(found.tokens) < size:
        _put(found, len(found.tokens), f"[PAD{len(found.tokens)}]", _UNUSED)
    places = {text: number for number, text in reversed(list(enumerate(found.tokens)))}
    named = {**_optional(folder / "special_tokens_map.json"), **settings}
    for role in _ROLES:
        number = places.get(_text(named.get(f"{role}_token")))
        if number is not None:
            found.special[role] = number
    found.adds_bos = bool(settings.get("add_bos_token", found.model == "llama")) and "bos" in found.special
    return found


def add_vocabulary(writer: Any, vocabulary: Vocabulary, chat_template: str | None) -> None:
    """`writer`: gguf.GGUFWriter. With a chat template BOS is written by the template alone, as the training had it."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for role, number in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos and chat_template is None)
    writer.add_add_eos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _byte_level(folder: Path) -> Vocabulary:
    content = read_json(folder / "tokenizer.json")
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise InputError("checkpoints.gguf_tokenizer", path=str(folder), reason=str(model.get("type")))
    added = {int(entry["id"]): entry for entry in content.get("added_tokens") or []}
    places = {int(number): text for text, number in model["vocab"].items()}
    places |= {number: entry["content"] for number, entry in added.items()}
    if sorted(places) != list(range(len(places))):
        raise InputError("checkpoints.gguf_tokenizer", path=str(folder), reason="ids")
    kinds = [
        _CONTROL if (entry := added.get(n)) and entry.get("special") else _USER_DEFINED if n in added else _NORMAL
        for n in range(len(places))
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    tokens = [places[number] for number in range(len(places))]
    return Vocabulary(
        "gpt2", _cutting_rule(content.get("pre_tokenizer"), folder), tokens, [0.0] * len(tokens), kinds, merges
    )


def _cutting_rule(value: Any, folder: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of tokenizer.json."""
    steps = (value or {}).get("pretokenizers") or [value or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        rule = str((steps[0].get("pattern") or {}).get("Regex"))
        if rule in _RULES:
            return _RULES[rule]
    raise InputError("checkpoints.gguf_tokenizer", path=str(folder), reason=" + ".join(map(str, kinds)))


def _sentencepiece(folder: Path) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    pieces.LoadFromFile(str(folder / "tokenizer.model"))
    tokens, scores, kinds = [], [], []
    for number in range(pieces.vocab_size()):
        # llama.cpp ends a text at NUL; InternLM2's vocabulary has it as a piece.
        tokens.append(pieces.IdToPiece(number).replace("\0", "🐉"))
        scores.append(float(pieces.GetScore(number)))
        kinds.append(_piece_kind(pieces, number))
    return Vocabulary("llama", "default", tokens, scores, kinds)


def _piece_kind(pieces: Any, number: int) -> int:
    if pieces.IsUnknown(number):
        return _UNKNOWN
    if pieces.IsControl(number):
        return _CONTROL
    if pieces.IsUnused(number):
        return _UNUSED
    return _BYTE if pieces.IsByte(number) else _NORMAL


def _put(found: Vocabulary, number: int, text: str, kind: int) -> None:
    """Set one token; a number past the end fills the gap with unused ones."""
    while len(found.tokens) <= number:
        found.tokens.append(f"[PAD{len(found.tokens)}]")
        found.scores.append(-1000.0)
        found.kinds.append(_UNUSED)
    if found.tokens[number] != text or found.kinds[number] in (_NORMAL, _UNUSED):
        found.tokens[number], found.kinds[number] = text, kind


def _text(value: Any) -> str:
    """A token's text, as a string or as an object that holds it; empty for none."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else ""


def _optional(file: Path) -> dict[str, Any]:
    value = read_json(file) if file.is_file() else {}
    return value if isinstance(value, dict) else {}
