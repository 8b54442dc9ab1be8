"""What a detector of `core.runs.health` says, and how it reads a line. Stdlib only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class Finding:
    """Something is wrong now."""

    level: str
    """`info`, `warning` or `error`."""
    params: dict[str, Any] = field(default_factory=dict)


class StepDetector(Protocol):
    """Looks at each step; says what it finds."""

    kind: ClassVar[str]

    def see(self, row: Mapping[str, Any]) -> Finding | None: ...


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a line, else None."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
