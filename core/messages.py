"""A message is a key and its parameters. Core speaks in messages; pages and command lines turn them into words.

Knows nothing of languages: `core.i18n.Catalog.say` looks the words up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One sentence to show to a person, independent of language."""

    key: str
    """Dotted key into the locale files: `<area>.<rest>`, e.g. `data.found.empty_turn`."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Values for the placeholders of the sentence; JSON types only."""

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "params": dict(self.params)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Message":
        return cls(str(value["key"]), dict(value.get("params", {})))


def message(key: str, /, **params: Any) -> Message:
    """Shorthand: `message("data.found.empty_turn", line=3)`."""
    return Message(key, params)
