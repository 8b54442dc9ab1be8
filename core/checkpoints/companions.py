"""What lies beside the weights: config, tokenizer, remote code, chat template, danlu.json. Knows no tensors."""

import json
import shutil
import string
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from core.checkpoints.card import write_card
from core.checkpoints.tensors import DTYPE_NAMES
from core.files import read_json, write_json
from core.xtuner.templates import PromptTemplate
from core.xtuner.tokens import training_tokens

DESCRIPTION: Final = "danlu.json"
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_OWN: Final = (DESCRIPTION, "README.md", "xtuner_config.py")
_TOKENIZER: Final = (
    "tokenizer*", "*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*", "tokenization_*.py", "*.tiktoken",
)  # fmt: skip


def companion_files(folder: Path) -> list[Path]:
    """Files of a model folder that are no weights, no hidden files and not Danlu's own."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if not path.name.endswith(_WEIGHT_SUFFIXES) and path.name not in _OWN]


def copy_companions(base: Path, target: Path) -> None:
    """Config, tokenizer, remote code, licence … of the base, byte for byte."""
    for file in companion_files(base):
        shutil.copyfile(file, target / file.name)


def copy_tokenizer(base: Path, target: Path) -> None:
    """Only what the tokenizer needs, for an adapter folder."""
    for file in {path for pattern in _TOKENIZER for path in base.glob(pattern) if path.is_file()}:
        if not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, target / file.name)


def write_chat_template(folder: Path, template: Mapping[str, Any] | None) -> None:
    """Make the tokenizer's chat template the one of the training; nothing happens if there is none or no tokenizer."""
    settings_file = folder / "tokenizer_config.json"
    if template is None or not settings_file.exists():
        return
    parsed = PromptTemplate.from_json(template)
    tokens = training_tokens(folder)
    settings = read_json(settings_file)
    settings["chat_template"] = to_jinja(parsed, bos=tokens.bos or "", eos=tokens.eos or "")
    write_json(settings_file, settings)
    for stale in ("chat_template.jinja", "chat_template.json"):
        (folder / stale).unlink(missing_ok=True)


def to_jinja(template: PromptTemplate, *, bos: str, eos: str) -> str:
    """A Hugging Face chat template that gives the text XTuner trains on: system text before the first question,
    BOS at the start (and after each EOS if the suffix does not stand for it), answer, suffix, EOS, separator."""
    ends = "" if template.SUFFIX_AS_EOS else eos
    begin = "{% if ns.round == 1 %}" + _text(bos) + "{% endif %}" if template.SUFFIX_AS_EOS else _text(bos)
    system = "" if template.SYSTEM is None else _fill(template.SYSTEM, {"system": "ns.system"})
    question = _fill(template.INSTRUCTION, {"input": "message['content']", "round": "ns.round"})
    return (
        "{% set ns = namespace(system='', round=0) %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}"
        "{% elif message['role'] == 'user' %}{% set ns.round = ns.round + 1 %}" + begin
        + "{% if ns.system %}" + system + "{% set ns.system = '' %}{% endif %}" + question
        + "{% else %}{{ message['content'] }}" + _text(template.SUFFIX + ends + template.SEP)
        + "{% endif %}{% endfor %}"
    )  # fmt: skip


def set_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of config.json where they differ; an untouched config keeps its bytes."""
    config = read_json(folder / "config.json")
    if any(config.get(key) != value for key, value in changes.items()):
        write_json(folder / "config.json", {**config, **changes})


def describe(
    folder: Path,
    *,
    kind: str,
    run: str | None,
    checkpoint: str | None,
    base_model: Mapping[str, Any] | None,
    prompt_template: Mapping[str, Any] | None,
    system: str | None,
    dtype: str,
    verified: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write danlu.json and the model card of a deliverable; returns what danlu.json holds."""
    value = {
        "schema_version": 1,
        "kind": kind,
        "run": run,
        "checkpoint": checkpoint,
        "base_model": dict(base_model) if base_model else None,
        "prompt_template": dict(prompt_template) if prompt_template else None,
        "system": system,
        "dtype": DTYPE_NAMES.get(dtype, dtype.lower()),
        "verified": dict(verified) if verified else None,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **dict(details or {}),
    }
    write_json(folder / DESCRIPTION, value)
    write_card(folder, value)
    return value


def _text(text: str) -> str:
    """Literal text inside a Jinja template, whatever braces and newlines it holds."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _fill(pattern: str, variables: Mapping[str, str]) -> str:
    """A `str.format` pattern as Jinja: fields become expressions."""

    parts = []
    for literal, name, _, _ in string.Formatter().parse(pattern):
        parts.append(_text(literal))
        if name:
            parts.append("{{ " + variables[name] + " }}")
    return "".join(parts)
