"""Words in zh and en for every message. Knows the locale files; knows no page and no session.

`core/locales/<language>/<area>.toml` holds the sentences of one area; the key `data.found.empty_turn` is the entry
`found.empty_turn` of `data.toml`. Placeholders are `str.format` fields.
"""

import string
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError
from core.messages import Message

LANGUAGES: Final = ("zh", "en")
LANGUAGE_NAMES: Final = {"zh": "中文", "en": "English"}
_FOLDER: Final = Path(__file__).parent / "locales"


class _Quiet(string.Formatter):
    """Leaves a placeholder without a value as it stands: a half sentence helps more than a traceback."""

    def get_value(self, key: int | str, _args: Any, kwargs: Any) -> Any:
        return kwargs.get(str(key), "{" + str(key) + "}")

    def format_field(self, value: Any, format_spec: str) -> str:
        try:
            return str(super().format_field(value, format_spec))
        except (ValueError, TypeError):
            return str(value)


@dataclass(frozen=True)
class Catalog:
    """All sentences of one language."""

    language: str
    sentences: dict[str, str]

    def text(self, key: str, /, **params: Any) -> str:
        """The sentence for `key` with its placeholders filled; the key itself if there is none (a test keeps that from happening)."""
        sentence = self.sentences.get(key)
        if sentence is None:
            return key
        if not params:
            return sentence
        said = {name: self.say(value) if isinstance(value, Message) else value for name, value in params.items()}
        return _Quiet().vformat(sentence, (), said)

    def say(self, message: Message) -> str:
        return self.text(message.key, **message.params)

    def explain(self, error: DanluError) -> tuple[str, str]:
        """What happened and what to do next, in words."""
        return self.say(error.what), self.say(error.next)


@cache
def catalog(language: str) -> Catalog:
    """The catalog of `language`, read once. An unknown language is English."""
    known = language if language in LANGUAGES else "en"
    sentences: dict[str, str] = {}
    for file in sorted((_FOLDER / known).glob("*.toml")):
        _flatten(file.stem, tomllib.loads(file.read_text(encoding="utf-8")), sentences)
    return Catalog(known, sentences)


def guess_language(locale: str | None) -> str:
    """zh for a Chinese browser locale (zh-CN, zh-TW, …), else en."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"


def placeholders(sentence: str) -> frozenset[str]:
    """Names of the `{…}` fields in a sentence."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(sentence) if name)


def _flatten(prefix: str, table: dict[str, Any], into: dict[str, str]) -> None:
    for key, value in table.items():
        path = f"{prefix}.{key}"
        if isinstance(value, dict):
            _flatten(path, value, into)
        else:
            into[path] = str(value)
