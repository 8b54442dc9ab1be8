"""What a field of the form is: where it stands in a config, its type, its range and what is usual. Knows no single field."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """How a value is asked for."""

    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"
    CHOICE = "choice"
    SWITCH = "switch"
    LINES = "lines"
    """A list of texts, one a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the form. Words: `config.fields.<key>.label` and `.help`."""

    key: str
    paths: tuple[str, ...]
    """Where it may stand; the first that exists counts. With `may_add`, the first is where it is put."""
    kind: Kind
    group: str
    minimum: float | None = None
    maximum: float | None = None
    usual: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    may_add: bool = False
    default: Any = None
    """What XTuner takes where the config does not say."""
