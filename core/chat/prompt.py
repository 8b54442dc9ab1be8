"""Messages to token ids, as in training: the template of the run, else the one that fits the model, else the tokenizer's own.

What a person writes is never tokenised as a special token, so written-out markers forge no role. Loads no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import InputError
from core.xtuner.templates import Piece, PromptTemplate, guess_template, prompt_templates, render_segments
from core.xtuner.tokens import training_tokens

_ROLES: Final = ("system", "user", "assistant")
_MARK: Final = "\ue000{}\ue001"
"""Stands for a message's text while the tokenizer's own template is rendered: private-use characters, never in a template."""


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns conversations of one model into token ids."""

    tokenizer: Any
    template: PromptTemplate | None
    """None: the tokenizer's own chat template."""
    bos: str = ""
    eos: str = ""

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids up to where the answer begins. Raises InputError `chat.bad_message`, and those of `core.xtuner.templates`."""
        check_messages(messages)
        return [token for segment in self.segments(messages) for token in self._encode_segment(segment)]

    def segments(self, messages: Sequence[Mapping[str, Any]]) -> list[list[Piece]]:
        """What is tokenised in one go, as (text, is the template's own) pieces; joined it is the prompt to show."""
        if self.template is not None:
            return render_segments(self.template, messages, add_generation_prompt=True, bos=self.bos, eos=self.eos)
        return [_render_own(self.tokenizer, messages)]

    def explain(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`text` and `tokens` (a count) of the prompt; `own_text` as the tokenizer's own template would have it, and whether that
        gives the same tokens (`is_same`); None where there is no other template to compare with.
        """
        ids = self.encode(messages)
        explained: dict[str, Any] = {
            "text": "".join(text for segment in self.segments(messages) for text, _ in segment),
            "tokens": len(ids),
            "own_text": None,
            "is_same": None,
        }
        if self.template is None or not getattr(self.tokenizer, "chat_template", None):
            return explained
        own = PromptEncoder(self.tokenizer, None)
        try:
            own_ids = own.encode(messages)
        except InputError:
            return explained  # the tokenizer's template refuses these messages (no system role, for example)
        own_text = "".join(text for segment in own.segments(messages) for text, _ in segment)
        return {**explained, "own_text": own_text, "is_same": own_ids == ids}

    @property
    def stop_words(self) -> tuple[str, ...]:
        return self.template.STOP_WORDS if self.template else ()

    def stop_tokens(self, also: Sequence[int] = ()) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's EOS, stop words that are one token, and `also` (the model's own)."""
        ids = {int(token) for token in also}
        if self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        for word in self.stop_words:
            encoded = self.tokenizer.encode(word, add_special_tokens=False)
            if len(encoded) == 1:
                ids.add(int(encoded[0]))
        return frozenset(ids)

    def _encode_segment(self, segment: Sequence[Piece]) -> list[int]:
        markers = added_tokens(self.tokenizer)
        if not any(marker in text for text, is_own in segment if not is_own for marker in markers):
            return self._tokens("".join(text for text, _ in segment))
        ids: list[int] = []
        for text, is_own in segment:
            for part in [text] if is_own else _break_markers(text, markers):
                ids += self._tokens(part)
        return ids

    def _tokens(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]


def make_encoder(tokenizer: Any, model: Path, template: Mapping[str, Any] | str | None) -> PromptEncoder:
    """The encoder for `model`. `template`: what a run or deliverable recorded, the name of one, or None to find it.

    Raises InputError `chat.no_template` if nothing says how this model is to be asked, `chat.unknown_template`.
    """
    found = _find_template(model, template)
    if found is None and not getattr(tokenizer, "chat_template", None):
        raise InputError("chat.no_template", path=str(model))
    if found is None:
        return PromptEncoder(tokenizer, None)
    tokens = training_tokens(model)
    return PromptEncoder(tokenizer, found, tokens.bos or "", tokens.eos or "")


def check_messages(messages: Any) -> None:
    """Raises InputError `chat.bad_message` naming the first message that has no known role or no text."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("chat.no_messages")
    for number, message in enumerate(messages, start=1):
        is_right = isinstance(message, Mapping) and message.get("role") in _ROLES
        if not is_right or not isinstance(message.get("content"), str):
            raise InputError("chat.bad_message", number=number, roles=", ".join(_ROLES))


def added_tokens(tokenizer: Any) -> frozenset[str]:
    """Every text that the tokenizer takes for one token of its own, special or not."""
    return frozenset({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}) - {""}


def hidden_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens, which are never shown; `all_special_ids` alone misses those without a role of their own."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {int(token) for token, meaning in added.items() if meaning.special}
    return frozenset(special | {int(token) for token in tokenizer.all_special_ids})


def _find_template(model: Path, template: Mapping[str, Any] | str | None) -> PromptTemplate | None:
    if isinstance(template, Mapping):
        return PromptTemplate.from_json(template)
    name = template if isinstance(template, str) else guess_template(model)
    if name is None:
        return None
    known = prompt_templates()
    if name not in known:
        raise InputError("chat.unknown_template", name=name, known=", ".join(sorted(known)))
    return known[name]


def _break_markers(text: str, markers: frozenset[str]) -> list[str]:
    """Parts of `text`, none of which holds a marker: each marker is cut after its first character."""
    parts, rest = [], text
    while found := min(((at, -len(marker)) for marker in markers if (at := rest.find(marker)) >= 0), default=None):
        parts.append(rest[: found[0] + 1])
        rest = rest[found[0] + 1 :]
    return [part for part in (*parts, rest) if part]


def _render_own(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    marked = [{"role": message["role"], "content": _MARK.format(at)} for at, message in enumerate(messages)]
    try:
        text = str(tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        raise InputError("chat.template_failed", reason=str(error)) from error
    pieces: list[Piece] = []
    for at, message in enumerate(messages):
        before, mark, after = text.partition(_MARK.format(at))
        if mark:
            pieces += [(before, True), (str(message["content"]), False)]
            text = after
    return [piece for piece in (*pieces, (text, True)) if piece[0]]
