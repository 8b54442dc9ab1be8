"""Says what lies in a model folder, without torch and without loading a tensor. Changes nothing."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.errors import InputError
from core.files import read_json, tree_size_bytes
from core.messages import Message, message
from core.models.weights import read_weights
from core.xtuner.tokens import training_tokens

_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_CONTEXT_KEYS: Final = (
    "max_position_embeddings",
    "seq_length",
    "n_positions",
    "max_sequence_length",
    "model_max_length",
)
_CHAT_NAME: Final = re.compile(r"(^|[-_.])(chat|instruct|it|sft|assistant)([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a person wants to know of a base model before choosing it."""

    name: str
    path: Path
    architecture: str | None
    model_type: str | None
    parameters: int | None
    """From safetensors headers; for `.bin` files estimated from their size."""
    dtype: str | None
    context_length: int | None
    vocabulary_size: int | None
    tokenizer_class: str | None
    has_bos: bool
    has_chat_template: bool
    is_chat: bool
    license: str | None
    remote_code: tuple[str, ...]
    """Python files of the folder; they run when the model is loaded if `needs_remote_code`."""
    needs_remote_code: bool
    disk_bytes: int
    is_tied: bool
    """Input and output embeddings are one tensor."""
    is_link: bool
    source: str = "project"
    """`project`, `shared` or `cache`."""
    problems: tuple[Message, ...] = field(default=())
    """What keeps it from being trained, or will surprise later."""

    @property
    def is_usable(self) -> bool:
        return not self.problems


def inspect_model(folder: Path, source: str = "project") -> ModelCard:
    """The card of `folder`. Raises InputError if it is no folder or has no readable config.json; all else is in `problems`."""
    if not folder.is_dir():
        raise InputError("models.not_a_folder", path=str(folder))
    if not (folder / "config.json").is_file():
        raise InputError("models.no_config", path=str(folder))
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError("models.no_config", path=str(folder))
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    config_dtype = str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or "") or None
    weights = read_weights(folder, config_dtype)
    tokenizer = _optional_json(folder / "tokenizer_config.json")
    template = (
        bool(tokenizer.get("chat_template"))
        or (folder / "chat_template.jinja").is_file()
        or (folder / "chat_template.json").is_file()
    )
    code = tuple(sorted(file.name for file in folder.glob("*.py")))
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    tokenizer_class = str(tokenizer["tokenizer_class"]) if tokenizer.get("tokenizer_class") else None
    has_bos = _has_bos(folder, tokenizer)
    problems = [*weights.problems, *_problems(folder, config, architecture, tokenizer_class)]
    return ModelCard(
        name=folder.name,
        path=folder,
        architecture=architecture,
        model_type=str(config["model_type"]) if config.get("model_type") else None,
        parameters=weights.parameters,
        dtype=_DTYPES.get(weights.dtype or "", weights.dtype) or config_dtype,
        context_length=next((int(text[key]) for key in _CONTEXT_KEYS if isinstance(text.get(key), int)), None),
        vocabulary_size=int(text["vocab_size"]) if isinstance(text.get("vocab_size"), int) else None,
        tokenizer_class=tokenizer_class,
        has_bos=has_bos,
        has_chat_template=template,
        is_chat=template or bool(_CHAT_NAME.search(folder.name)),
        license=_license(folder),
        remote_code=code,
        needs_remote_code="auto_map" in config or "auto_map" in tokenizer,
        disk_bytes=tree_size_bytes(folder),
        is_tied=bool(
            text.get("tie_word_embeddings", "lm_head.weight" not in weights.tensor_names and bool(weights.tensor_names))
        ),
        is_link=folder.is_symlink(),
        source=source,
        problems=tuple(problems),
    )


def fingerprint(folder: Path) -> str:
    """Hash of config.json and of the weight files' names, sizes and headers: tells models apart without reading the weights.

    Raises InputError as `inspect_model` does.
    """
    if not (folder / "config.json").is_file():
        raise InputError("models.no_config", path=str(folder))
    config = read_json(folder / "config.json")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(read_weights(folder, None).header_digest.encode())
    return digest.hexdigest()


def _problems(
    folder: Path, config: dict[str, Any], architecture: str | None, tokenizer_class: str | None
) -> list[Message]:
    found = []
    if architecture is None:
        found.append(message("models.problems.no_architecture"))
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES) and not list(folder.glob("*.tiktoken")):
        found.append(message("models.problems.no_tokenizer"))
    elif training_tokens(folder).bos is None:
        found.append(message("models.problems.no_bos", tokenizer=tokenizer_class or "-"))
    if isinstance(config.get("quantization_config"), dict):
        method = str(config["quantization_config"].get("quant_method", "?"))
        found.append(message("models.problems.quantized", method=method))
    needed = {
        str(value).split("--")[-1].split(".")[0] + ".py"
        for value in _flat(config.get("auto_map"))
        if "--" not in str(value)
    }
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        found.append(message("models.problems.missing_code", files=", ".join(missing)))
    return found


def _flat(auto_map: Any) -> list[Any]:
    values = auto_map.values() if isinstance(auto_map, dict) else []
    return [item for value in values for item in (value if isinstance(value, list) else [value]) if item]


def _has_bos(folder: Path, tokenizer: dict[str, Any]) -> bool:
    return bool(tokenizer.get("bos_token") or _optional_json(folder / "special_tokens_map.json").get("bos_token"))


def _optional_json(file: Path) -> dict[str, Any]:
    """A side file: if it is missing or broken the card just lacks what it says."""
    try:
        value = read_json(file)
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def _license(folder: Path) -> str | None:
    """From the front matter of README.md, as the hubs write it."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return None
    front = re.match(r"\ufeff?---\s*\n(.*?)\n---", text, re.DOTALL)
    stated = re.search(r"^license:\s*(.+?)\s*$", front[1], re.MULTILINE) if front else None
    return stated[1].strip("'\"") if stated else None
