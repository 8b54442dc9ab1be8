"""What can be wrong with a data set: the codes, how bad each is, what conversion does about it, and a report of how often it was met.

The sentence of a code is `data.found.<code>` in the locales.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from core.data.formats import Detection
from core.messages import Message

MOST_EXAMPLES: Final = 5
MOST_LINES: Final = 1000
"""Line numbers kept of each finding, for the download."""


class Severity(StrEnum):
    ERROR = "error"
    """Training would stop, or learn something else than what the file says."""
    WARNING = "warning"
    """Training runs; the result may suffer."""
    INFO = "info"


class Remedy(StrEnum):
    """What conversion does with a row that has the problem."""

    FIX = "fix"
    """Mends it without changing what the row says."""
    DROP = "drop"
    """Leaves the row out and lists it."""
    NONE = "none"
    """Nothing: a person has to look."""


_E, _W, _I = Severity.ERROR, Severity.WARNING, Severity.INFO
CODES: Final[Mapping[str, tuple[Severity, Remedy]]] = {
    # the file
    "empty_file": (_E, Remedy.NONE),
    "no_rows": (_E, Remedy.NONE),
    "unknown_format": (_E, Remedy.NONE),
    "unsure_format": (_W, Remedy.NONE),
    "bom": (_I, Remedy.FIX),
    "encoding": (_E, Remedy.FIX),
    "not_utf8": (_E, Remedy.DROP),
    "broken_json": (_E, Remedy.DROP),
    "cut_off": (_E, Remedy.DROP),
    "trailing_comma": (_E, Remedy.FIX),
    "wrapped_rows": (_E, Remedy.FIX),
    "too_long": (_E, Remedy.DROP),
    "too_deep": (_E, Remedy.DROP),
    "blank_line": (_I, Remedy.FIX),
    "broken_csv": (_E, Remedy.DROP),
    "cell_count": (_E, Remedy.DROP),
    "repeated_column": (_E, Remedy.NONE),
    "broken_parquet": (_E, Remedy.NONE),
    "group_too_large": (_E, Remedy.NONE),
    # a row
    "not_an_object": (_E, Remedy.DROP),
    "repeated_key": (_E, Remedy.FIX),
    "missing_key": (_E, Remedy.DROP),
    "other_shape": (_E, Remedy.DROP),
    "not_a_list": (_E, Remedy.DROP),
    "no_messages": (_E, Remedy.DROP),
    "not_a_message": (_E, Remedy.DROP),
    "duplicate_row": (_W, Remedy.DROP),
    # roles and their order
    "role_alias": (_E, Remedy.FIX),
    "unknown_role": (_E, Remedy.DROP),
    "tool_role": (_E, Remedy.DROP),
    "leading_answer": (_W, Remedy.FIX),
    "trailing_question": (_W, Remedy.FIX),
    "no_answer": (_E, Remedy.DROP),
    "repeated_answer": (_E, Remedy.DROP),
    "repeated_question": (_W, Remedy.FIX),
    "repeated_system": (_W, Remedy.FIX),
    "late_system": (_W, Remedy.NONE),
    # what is said
    "null_content": (_E, Remedy.DROP),
    "content_parts": (_E, Remedy.FIX),
    "media_content": (_E, Remedy.DROP),
    "content_number": (_E, Remedy.FIX),
    "content_object": (_E, Remedy.DROP),
    "empty_answer": (_E, Remedy.DROP),
    "empty_question": (_W, Remedy.NONE),
    "empty_system": (_I, Remedy.FIX),
    "empty_text": (_E, Remedy.DROP),
    "null_input": (_E, Remedy.FIX),
    "no_output": (_W, Remedy.DROP),
    "lost_history": (_W, Remedy.FIX),
    "lost_system": (_W, Remedy.FIX),
    "lone_surrogate": (_E, Remedy.DROP),
    "null_byte": (_W, Remedy.FIX),
    "damaged_text": (_W, Remedy.NONE),
    "template_tokens": (_W, Remedy.NONE),
    # loss keys
    "mixed_loss": (_E, Remedy.FIX),
    "loss_not_bool": (_E, Remedy.FIX),
    "nothing_learned": (_E, Remedy.DROP),
}


@dataclass(frozen=True, slots=True)
class Example:
    line: int
    params: dict[str, Any]
    excerpt: str = ""


@dataclass(slots=True)
class Finding:
    """One kind of problem in a file."""

    code: str
    count: int = 0
    examples: list[Example] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """The first MOST_LINES places."""

    @property
    def severity(self) -> Severity:
        return CODES[self.code][0]

    @property
    def remedy(self) -> Remedy:
        return CODES[self.code][1]

    @property
    def message(self) -> Message:
        """What it is, with the parameters of its first place."""
        first = self.examples[0] if self.examples else Example(0, {})
        return Message(f"data.found.{self.code}", {**first.params, "line": first.line, "count": self.count})

    @property
    def remedy_message(self) -> Message:
        return Message(f"data.remedy.{self.remedy}")

    def to_json(self) -> dict[str, Any]:
        examples = [{"line": one.line, "params": one.params, "excerpt": one.excerpt} for one in self.examples]
        return {"code": self.code, "count": self.count, "examples": examples, "lines": self.lines}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Finding":
        examples = [Example(one["line"], one["params"], one["excerpt"]) for one in value["examples"]]
        return cls(value["code"], value["count"], examples, list(value["lines"]))


class Findings:
    """Problems met so far, by code."""

    def __init__(self) -> None:
        self.by_code: dict[str, Finding] = {}

    def add(self, code: str, line: int, params: Mapping[str, Any] | None = None, excerpt: str = "") -> None:
        finding = self.by_code.get(code)
        if finding is None:
            finding = self.by_code[code] = Finding(code)
        finding.count += 1
        if len(finding.examples) < MOST_EXAMPLES:
            finding.examples.append(Example(line, dict(params or {}), excerpt))
        if len(finding.lines) < MOST_LINES:
            finding.lines.append(line)

    def merge(self, other: "Findings", line_offset: int) -> None:
        """Add what was found in a later part of the file, whose line 1 is `line_offset` + 1."""
        for code, more in other.by_code.items():
            mine = self.by_code.setdefault(code, Finding(code))
            mine.count += more.count
            moved = [Example(one.line + line_offset, one.params, one.excerpt) for one in more.examples]
            mine.examples = (mine.examples + moved)[:MOST_EXAMPLES]
            mine.lines = (mine.lines + [line + line_offset for line in more.lines])[:MOST_LINES]

    def ordered(self) -> list[Finding]:
        """Errors first, then the most frequent."""
        rank = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}
        return sorted(self.by_code.values(), key=lambda finding: (rank[finding.severity], -finding.count, finding.code))


@dataclass(frozen=True, slots=True)
class Report:
    """What validation of one file found."""

    detection: Detection
    rows: int
    """Rows that could be read."""
    good_rows: int
    """Rows without an error."""
    findings: list[Finding]
    size_bytes: int
    sha256: str
    seconds: float = 0.0

    @property
    def errors(self) -> int:
        return sum(finding.count for finding in self.findings if finding.severity is Severity.ERROR)

    @property
    def warnings(self) -> int:
        return sum(finding.count for finding in self.findings if finding.severity is Severity.WARNING)

    @property
    def is_mendable(self) -> bool:
        """True if conversion does something about a problem."""
        return any(finding.remedy is not Remedy.NONE for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "detection": self.detection.to_json(),
            "rows": self.rows,
            "good_rows": self.good_rows,
            "findings": [finding.to_json() for finding in self.findings],
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        return cls(
            Detection.from_json(value["detection"]),
            value["rows"],
            value["good_rows"],
            [Finding.from_json(one) for one in value["findings"]],
            value["size_bytes"],
            value["sha256"],
            value["seconds"],
        )
