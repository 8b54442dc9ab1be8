"""Ollama's Modelfile: the file, the prompt template of the training in Go's template language, the system text, where to stop."""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.checkpoints.gguf_vocabulary import Vocabulary
from core.files import write_text
from core.xtuner.templates import PromptTemplate


def write_modelfile(
    folder: Path, weights: str, described: Mapping[str, Any], config: Mapping[str, Any], vocabulary: Vocabulary
) -> None:
    """`folder`/Modelfile for the GGUF file `weights`; `described` is the model's danlu.json."""
    lines = [f"FROM ./{weights}"]
    template = described.get("prompt_template")
    stops: list[str] = []
    if template:
        parsed = PromptTemplate.from_json(template)
        bos, eos = (_token(vocabulary, role) for role in ("bos", "eos"))
        stops = [word for word in dict.fromkeys([*parsed.STOP_WORDS, eos]) if word]
        lines.append(f'TEMPLATE """{to_go(parsed, bos=bos, eos=eos)}"""')
        if system := described.get("system"):
            lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    if length := config.get("max_position_embeddings"):
        lines.append(f"PARAMETER num_ctx {min(int(length), 8192)}")
    write_text(folder / "Modelfile", "\n".join(lines) + "\n")


def to_go(template: PromptTemplate, *, bos: str, eos: str) -> str:
    """The text XTuner trains on, as a Go template over `.Messages`. The file says that llama.cpp must not put a BOS itself.

    A `{round}` in the template becomes the place among the messages, halved and counted from 1, as far as Go can tell it: 1.
    """
    end = template.SUFFIX + ("" if template.SUFFIX_AS_EOS else eos) + template.SEP
    system = "" if template.SYSTEM is None else _fill(template.SYSTEM, {"system": "$system"})
    begin = "{{ if not $begun }}" + _text(bos) + "{{ end }}" if template.SUFFIX_AS_EOS else _text(bos)
    question = _fill(template.INSTRUCTION, {"input": "$message.Content", "round": "1"})
    return (
        '{{ $system := "" }}{{ $begun := false }}{{ range $message := .Messages }}'
        '{{ if eq $message.Role "system" }}{{ $system = $message.Content }}'
        '{{ else if eq $message.Role "user" }}' + begin
        + "{{ if $system }}" + system + '{{ $system = "" }}{{ end }}' + question + "{{ $begun = true }}"
        + "{{ else }}{{ $message.Content }}" + _text(end)
        + "{{ end }}{{ end }}"
    )  # fmt: skip


def _token(vocabulary: Vocabulary, role: str) -> str:
    number = vocabulary.special.get(role)
    return "" if number is None else vocabulary.tokens[number]


def _text(text: str) -> str:
    """Literal text, whatever braces, quotes and newlines it holds: a Go string is written as a JSON one."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _fill(pattern: str, variables: Mapping[str, str]) -> str:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(pattern):
        parts.append(_text(literal))
        if name:
            parts.append("{{ " + variables[name] + " }}")
    return "".join(parts)
