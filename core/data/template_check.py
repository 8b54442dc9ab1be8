"""The prompt template of XTuner against the tokenizer's own chat template: the same conversation through both, as a diff.

What a chat model answers best is text in its own template; trained with another one it has to unlearn it first.
"""

import json
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NoReturn

from core.errors import DanluError
from core.xtuner.templates import PromptTemplate, render
from core.xtuner.tokens import chat_template, training_tokens

_TURNS: Final = (
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2=?"},
    {"role": "assistant", "content": "4"},
)
_SYSTEM: Final = {"role": "system", "content": "Be brief."}
_PIECES: Final = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s|.", re.DOTALL)
"""Marks such as <|im_start|> and [INST] stand as one piece each."""


class Verdict(StrEnum):
    """What the comparison comes to."""

    SAME = "same"
    ENDS = "ends"
    """Only the very beginning (BOS) or end (a line break, EOS) differs, which does not matter."""
    SYSTEM = "system"
    """The same without a system text; the two put a system text differently, or one cannot take any."""
    DEFAULT_SYSTEM = "default_system"
    """The same but for a system text of its own that the chat template adds where none is given."""
    DIFFERENT = "different"
    NO_CHAT_TEMPLATE = "no_chat_template"
    BROKEN = "broken"
    """The chat template cannot be rendered."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text in the diff."""

    text: str
    side: str
    """`both`, `xtuner` or `tokenizer`: where it stands."""


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    verdict: Verdict
    pieces: tuple[Piece, ...] = ()
    """The diff of the conversation that shows the difference best; empty without a chat template."""
    reason: str = ""
    """What the chat template itself said, if it is broken."""


def check_template(template: PromptTemplate, model_folder: Path) -> TemplateCheck:
    """Render two rounds, with and without a system text, through both. Never raises for what a model's template does."""
    jinja = chat_template(model_folder)
    if jinja is None:
        return TemplateCheck(Verdict.NO_CHAT_TEMPLATE)
    tokens = training_tokens(model_folder)
    names = {"bos": tokens.bos or "", "eos": tokens.eos or ""}
    try:
        theirs = _render_jinja(jinja, list(_TURNS), **names)
    except Exception as error:  # noqa: BLE001 - a program of the model's author: it may raise anything
        return TemplateCheck(Verdict.BROKEN, reason=f"{type(error).__name__}: {error}"[:200])
    ours = _render_xtuner(template, list(_TURNS), **names) or ""
    pieces = diff(ours, theirs)
    without = _judge(pieces, **names)
    if without is Verdict.DIFFERENT:
        bare = _judge(diff(ours, _without_system(theirs, template)), **names)
        without = without if bare is Verdict.DIFFERENT else Verdict.DEFAULT_SYSTEM
    if without is Verdict.DIFFERENT:
        return TemplateCheck(without, pieces)
    with_ours = _render_xtuner(template, [_SYSTEM, *_TURNS], **names)
    with_theirs = _try_jinja(jinja, [_SYSTEM, *_TURNS], **names)
    system_pieces = diff(with_ours or "", with_theirs or "")
    if with_ours is None or with_theirs is None or _judge(system_pieces, **names) is Verdict.DIFFERENT:
        return TemplateCheck(Verdict.SYSTEM, system_pieces)
    return TemplateCheck(without, pieces)


def diff(ours: str, theirs: str) -> tuple[Piece, ...]:
    """Both texts as one row of stretches, in order; marks of templates are never torn apart."""
    left, right = _PIECES.findall(ours), _PIECES.findall(theirs)
    found: list[Piece] = []
    for kind, start, end, other_start, other_end in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(Piece("".join(left[start:end]), "both"))
            continue
        found += [Piece("".join(left[start:end]), "xtuner")] if end > start else []
        found += [Piece("".join(right[other_start:other_end]), "tokenizer")] if other_end > other_start else []
    return tuple(found)


def _judge(pieces: tuple[Piece, ...], *, bos: str, eos: str) -> Verdict:
    if all(piece.side == "both" for piece in pieces):
        return Verdict.SAME
    inner = [at for at, piece in enumerate(pieces) if piece.side == "both"]
    if not inner:
        return Verdict.DIFFERENT
    outside = [piece for at, piece in enumerate(pieces) if piece.side != "both" and not inner[0] < at < inner[-1]]
    is_all_outside = len(outside) == sum(piece.side != "both" for piece in pieces)
    is_harmless = all(not piece.text.replace(bos or "\0", "").replace(eos or "\0", "").strip() for piece in outside)
    return Verdict.ENDS if is_all_outside and is_harmless else Verdict.DIFFERENT


def _without_system(theirs: str, template: PromptTemplate) -> str:
    """`theirs` without its first system turn, if it has one in the form of XTuner's own template."""
    if template.SYSTEM is None:
        return theirs
    before, _, after = template.SYSTEM.partition("{system}")
    return re.sub(re.escape(before) + ".+?" + re.escape(after), "", theirs, count=1, flags=re.DOTALL)


def _render_xtuner(template: PromptTemplate, messages: list[dict[str, str]], *, bos: str, eos: str) -> str | None:
    """None if the template has no place for a system text."""
    try:
        return "".join(text for text, _ in render(template, messages, False, bos=bos, eos=eos))
    except DanluError:
        return None


def _try_jinja(source: str, messages: list[dict[str, str]], *, bos: str, eos: str) -> str | None:
    """None if the template refuses a system text."""
    try:
        return _render_jinja(source, messages, bos=bos, eos=eos)
    except Exception:  # noqa: BLE001 - as above
        return None


def _render_jinja(source: str, messages: list[dict[str, str]], *, bos: str, eos: str) -> str:
    """As transformers renders it (utils/chat_template_utils.py): sandboxed, blocks trimmed, its extra functions at hand."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(reason: str) -> NoReturn:
        raise TemplateError(reason)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda _format: "2026-01-01"}
    template = environment.from_string(source)
    return template.render(messages=messages, add_generation_prompt=False, bos_token=bos, eos_token=eos)
