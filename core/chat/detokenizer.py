"""Token ids to text as they come: never decodes the whole answer again, never gives half a character, ends at stop words."""

from collections.abc import Sequence
from typing import Any, Final

_HALF: Final = "\ufffd"
_PENDING_TOKENS: Final = 8
"""A character has at most four bytes; tokens that make none after this many are broken bytes and are shown as such."""


class Detokenizer:
    """The text of one answer. `add` gives what can be shown now; `finish` what is left."""

    def __init__(self, tokenizer: Any, hidden: frozenset[int], stop_words: Sequence[str] = ()) -> None:
        """`hidden`: special tokens that are never shown."""
        self._tokenizer, self._hidden = tokenizer, hidden
        self._stop_words = tuple(stop_words)
        self._tokens: list[int] = []
        self._shown = 0
        """Tokens before this one have been turned into text; the one before it stays as context for spaces."""
        self._context = 0
        self._held = ""
        self.is_stopped = False
        """A stop word has come; what follows is not shown."""

    def add(self, token: int) -> str:
        if token in self._hidden or self.is_stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._decode(is_last=False))

    def finish(self) -> str:
        """The rest, without a character that was never completed."""
        if self.is_stopped:
            return ""
        text = self._held + self._decode(is_last=True).rstrip(_HALF)
        self._held = ""
        return self._cut(text)

    def _decode(self, *, is_last: bool) -> str:
        before = self._text(self._tokens[self._context : self._shown])
        after = self._text(self._tokens[self._context :])
        is_waiting = after.endswith(_HALF) and len(self._tokens) - self._shown < _PENDING_TOKENS
        if len(after) <= len(before) or (is_waiting and not is_last):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) if tokens else ""

    def _release(self, text: str) -> str:
        """Hold back an end that may be the beginning of a stop word."""
        text = self._cut(self._held + text)
        self._held = ""
        if self.is_stopped:
            return text
        longest = max(map(len, self._stop_words), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(word.startswith(text[-size:]) for word in self._stop_words):
                text, self._held = text[:-size], text[-size:]
                break
        return text

    def _cut(self, text: str) -> str:
        found = [at for word in self._stop_words if (at := text.find(word)) >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        return text
