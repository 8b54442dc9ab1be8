"""XTuner's prompt templates: read from its source, rendered as it trains on them, guessed for a model folder.

Reads the installed package by `ast`, never imports it (that would pull torch). Knows no tokenizer: it yields text.
"""

import ast
import importlib.util
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

from core.errors import InputError, MachineError
from core.xtuner.tokens import guess_template

__all__ = [
    "Piece",
    "PromptTemplate",
    "ast_dict",
    "guess_template",
    "prompt_templates",
    "render",
    "render_segments",
    "system_templates",
    "xtuner_folder",
]

Piece = tuple[str, bool]
"""Text, and whether it is the template's own (tokenise it with special tokens) or a person's (tokenise it without)."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One entry of XTuner's PROMPT_TEMPLATE; fields are named as there."""

    INSTRUCTION: str
    """One turn up to where the answer begins, with `{input}` and perhaps `{round}` (counted from 1)."""
    SYSTEM: str | None = None
    """Put before the instruction of a turn with a system text, with `{system}`. None: the model knows no such text."""
    SUFFIX: str = ""
    """Put after each answer and learned."""
    SUFFIX_AS_EOS: bool = False
    """True: the suffix ends the answer. False: the tokenizer's EOS follows it, and the next turn begins with BOS."""
    SEP: str = ""
    """Put between turns, not learned."""
    STOP_WORDS: tuple[str, ...] = ()
    name: str = ""
    """Its key in PROMPT_TEMPLATE; empty for one written in a config."""

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "name": self.name,
            "INSTRUCTION": self.INSTRUCTION,
            "SUFFIX": self.SUFFIX,
            "SUFFIX_AS_EOS": self.SUFFIX_AS_EOS,
            "SEP": self.SEP,
            "STOP_WORDS": list(self.STOP_WORDS),
        }
        return value if self.SYSTEM is None else {"SYSTEM": self.SYSTEM, **value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Of what to_json wrote, or of a config's own `dict(INSTRUCTION=…)`. Raises InputError `templates.broken`."""
        instruction, system = value.get("INSTRUCTION"), value.get("SYSTEM")
        _require_fields("INSTRUCTION", instruction, required="input", known={"input", "round"})
        if system is not None:
            _require_fields("SYSTEM", system, required="system", known={"system"})
        return cls(
            INSTRUCTION=str(instruction),
            SYSTEM=None if system is None else str(system),
            SUFFIX=str(value.get("SUFFIX") or ""),
            SUFFIX_AS_EOS=bool(value.get("SUFFIX_AS_EOS", False)),
            SEP=str(value.get("SEP") or ""),
            STOP_WORDS=tuple(value.get("STOP_WORDS") or ()),
            name=str(value.get("name", "")),
        )


def xtuner_folder() -> Path:
    """The folder of the installed package `xtuner`. Raises MachineError `templates.no_xtuner`."""
    found = importlib.util.find_spec("xtuner")
    if found is None or not found.submodule_search_locations:
        raise MachineError("templates.no_xtuner")
    return Path(next(iter(found.submodule_search_locations)))


@cache
def prompt_templates() -> dict[str, PromptTemplate]:
    """Every prompt template of the installed XTuner by its name."""
    fields = _read_table("PROMPT_TEMPLATE")
    return {name: PromptTemplate.from_json({**ast_dict(node), "name": name}) for name, node in fields.items()}


@cache
def system_templates() -> dict[str, str]:
    """XTuner's SYSTEM_TEMPLATE: ready-made system texts by their name."""
    return {name: str(ast.literal_eval(node)) for name, node in _read_table("SYSTEM_TEMPLATE").items()}


def render(
    template: PromptTemplate,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    *,
    bos: str = "",
    eos: str = "",
) -> list[Piece]:
    """The text XTuner trains on for `messages` (roles system, user, assistant), as pieces in order.

    `bos`, `eos`: what `core.xtuner.tokens.training_tokens` says for the model; the template itself has neither.
    With `add_generation_prompt` the last message is the user's, and the text ends where the answer begins; without it
    a trailing question is left out, as XTuner does. Source: template_map_fn, openai_map_fn, encode_fn of XTuner 0.2.0.
    Raises InputError `templates.bad_role`, `templates.no_question`, `templates.no_system`.
    """
    segments = render_segments(template, messages, add_generation_prompt, bos=bos, eos=eos)
    return [piece for segment in segments for piece in segment]


def render_segments(
    template: PromptTemplate,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    *,
    bos: str = "",
    eos: str = "",
) -> list[list[Piece]]:
    """Like `render`, grouped: XTuner tokenises each group in one go (BOS | prompt | answer + suffix | EOS | separator).

    Where no piece of a person holds a special token, tokenising the joined text of each group gives the tokens of
    training exactly; piece by piece it may differ where two pieces meet.
    """
    turns, question = _split_turns(messages)
    segments: list[list[Piece]] = []
    needs_bos = True
    for number, (system, user, answer) in enumerate(turns, start=1):
        segments += [[(bos, True)]] if needs_bos else []
        segments.append(_prompt(template, system, user, number))
        segments.append([(answer, False), (template.SUFFIX, True)])
        needs_bos = not template.SUFFIX_AS_EOS
        segments += [[(eos, True)]] if needs_bos else []
        segments.append([(template.SEP, True)])
    if add_generation_prompt:
        if question is None:
            raise InputError("templates.no_question")
        segments += [[(bos, True)]] if needs_bos else []
        segments.append(_prompt(template, *question, len(turns) + 1))
    kept = ([piece for piece in segment if piece[0]] for segment in segments)
    return [segment for segment in kept if segment]


def ast_dict(node: ast.expr) -> dict[str, Any]:
    """The values of a `dict(a=1, …)` call or a `{…}` literal. Raises ValueError for what would have to be run."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    value = ast.literal_eval(node)
    if not isinstance(value, dict):
        raise ValueError("not a dict")
    return value


def _prompt(template: PromptTemplate, system: str, user: str, number: int) -> list[Piece]:
    pieces: list[Piece] = []
    if system:
        if template.SYSTEM is None:
            raise InputError("templates.no_system", template=template.name)
        pieces += _fill(template.SYSTEM, {"system": (system, False)})
    return pieces + _fill(template.INSTRUCTION, {"input": (user, False), "round": (str(number), True)})


def _fill(pattern: str, values: Mapping[str, Piece]) -> list[Piece]:
    pieces: list[Piece] = []
    for literal, name, _, _ in string.Formatter().parse(pattern):
        pieces += [(literal, True)] if literal else []
        pieces += [values[name]] if name else []
    return pieces


def _split_turns(messages: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, str, str]], tuple[str, str] | None]:
    """(system, user, answer) of each turn as openai_map_fn makes them; (system, user) of a question without answer."""
    started = next((at for at, message in enumerate(messages) if message.get("role") != "assistant"), len(messages))
    turns: list[tuple[str, str, str]] = []
    system, user, is_open = "", "", False
    for number, message in enumerate(messages[started:], start=started + 1):
        role, content = message.get("role"), message.get("content")
        if role not in {"system", "user", "assistant"} or not isinstance(content, str):
            raise InputError("templates.bad_role", number=number, role=str(role))
        if role == "system":
            system = content
        elif role == "user":
            user, is_open = user + content, True
        else:
            turns.append((system, user, content))
            system, user, is_open = "", "", False
    return turns, (system, user) if is_open else None


def _require_fields(where: str, pattern: Any, *, required: str, known: set[str]) -> None:
    """Raises InputError unless `pattern` is a text that holds `{required}` and no unknown field."""
    if not isinstance(pattern, str):
        raise InputError("templates.broken", field=where, required=required, reason=repr(pattern))
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
    except ValueError as error:
        raise InputError("templates.broken", field=where, required=required, reason=str(error)) from error
    if required not in names or names - known:
        raise InputError("templates.broken", field=where, required=required, reason=pattern)


_TEMPLATES_FILE: Final = Path("utils") / "templates.py"


def _read_table(name: str) -> dict[str, ast.expr]:
    file = xtuner_folder() / _TEMPLATES_FILE
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise MachineError("templates.unreadable", path=str(file), reason=str(error)) from error
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
            if name in names:
                return {keyword.arg: keyword.value for keyword in statement.value.keywords if keyword.arg}
    raise MachineError("templates.unreadable", path=str(file), reason=f"{name}?")
