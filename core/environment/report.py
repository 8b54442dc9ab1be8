"""What the doctor says, as data: lines with a colour, a sentence and the command that mends it. Examines nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from core.messages import Message


class Status(StrEnum):
    """Colour of a line."""

    GREEN = "green"
    AMBER = "amber"
    """Works, or works in part: something is slower, missing or untested."""
    RED = "red"
    """Training would fail or go wrong."""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing examined."""

    group: str
    """`python`, `gpu`, `packages`, `machine`."""
    name: str
    """In the field's own words: a package, a device."""
    status: Status
    message: Message
    fix: str | None = None
    """Shell command that mends it, if one does."""

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "name": self.name,
            "status": str(self.status),
            "message": self.message.to_json(),
            "fix": self.fix,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Line":
        return cls(
            str(value["group"]),
            str(value["name"]),
            Status(value["status"]),
            Message.from_json(value["message"]),
            value.get("fix"),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """All lines of one examination."""

    python: str
    examined_at: str
    """ISO 8601 in UTC."""
    lines: tuple[Line, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What core.environment.probe found."""

    @property
    def status(self) -> Status:
        """The worst colour of all lines."""
        colours = {line.status for line in self.lines}
        return next((colour for colour in (Status.RED, Status.AMBER) if colour in colours), Status.GREEN)

    def count(self, status: Status) -> int:
        return sum(line.status is status for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        lines = [line.to_json() for line in self.lines]
        return {
            "schema_version": 1,
            "python": self.python,
            "examined_at": self.examined_at,
            "lines": lines,
            "facts": dict(self.facts),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        lines = tuple(Line.from_json(line) for line in value["lines"])
        return cls(str(value["python"]), str(value["examined_at"]), lines, dict(value.get("facts", {})))
