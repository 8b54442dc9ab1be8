"""The parts of the speed layer: what each is called, and the report of which ran and why the others did not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.files import read_json
from core.i18n import catalog
from core.messages import Message, message

FAST_PASS: Final = "fast_pass"  # noqa: S105 - a pass through a model
BLOCK_ATTENTION: Final = "block_attention"
GROUPED: Final = "grouped_micro_batches"
RECOMPUTE: Final = "selective_recomputation"
NORM: Final = "norm_kernel"
ROTARY: Final = "rotary_kernel"
SWIGLU: Final = "swiglu_kernel"
UNPACKED: Final = "unpacked_weights"
OPTIMIZER: Final = "fused_optimizer"

ALL: Final = (FAST_PASS, BLOCK_ATTENTION, GROUPED, RECOMPUTE, NORM, ROTARY, SWIGLU, UNPACKED, OPTIMIZER)
"""In the order in which they are shown; `speed.parts.<name>` and `speed.does.<name>` are their words."""
REPORT_FILE: Final = "speed.json"


@dataclass(frozen=True, slots=True)
class Wish:
    """What run.json's `details.speed` asks for."""

    parts: frozenset[str] = frozenset(ALL)
    tokens_per_pass: int | None = None
    """Tokens computed together; None: chosen by memory."""
    memory_limit_bytes: int | None = None
    """Stay below this on the device; None: what is free."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str | None) -> "Wish":
        """`"auto"` or None: every part; `"off"`: none; or `{"parts": [...], "tokens_per_pass": n, "memory_limit_bytes": n}`.

        Unknown parts (of a newer version) are left aside.
        """
        if value is None or value == "auto":
            return cls()
        if isinstance(value, str):
            return cls(frozenset())
        named = value.get("parts", "auto")
        parts = frozenset(ALL) if named == "auto" else frozenset(named) & frozenset(ALL)
        return cls(parts, value.get("tokens_per_pass"), value.get("memory_limit_bytes"))

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": sorted(self.parts),
            "tokens_per_pass": self.tokens_per_pass,
            "memory_limit_bytes": self.memory_limit_bytes,
        }

    def __contains__(self, part: str) -> bool:
        return part in self.parts


@dataclass(frozen=True, slots=True)
class PartReport:
    """What became of one part."""

    name: str
    applied: bool
    note: Message
    """How it runs (sizes), or why it was left out."""

    def line(self) -> str:
        """For the log."""
        return f"speed: {self.name} {'on' if self.applied else 'left out'}: {catalog('en').say(self.note)}"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "applied": self.applied, "note": _note_json(self.note)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PartReport":
        return cls(str(value["name"]), bool(value["applied"]), _note(value["note"]))


class Reports:
    """Collects one report a part."""

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._reports: dict[str, PartReport] = {}

    def on(self, part: str, note: Message | None = None) -> None:
        self._reports[part] = PartReport(part, True, note or Message(f"speed.does.{part}"))

    def off(self, part: str, why: Message) -> None:
        self._reports[part] = PartReport(part, False, why if part in self._wish else message("speed.left.not_asked"))

    def finish(self, why: Message) -> Sequence[PartReport]:
        """One report for each part; those that nothing was said of get `why`, or that they were not asked for."""
        for part in ALL:
            if part not in self._reports:
                self.off(part, why)
        return [self._reports[part] for part in ALL]


def read_reports(run: Path) -> list[PartReport]:
    """What speed.json of a run folder says; empty if the run has none (yet)."""
    file = run / REPORT_FILE
    return [PartReport.from_json(entry) for entry in read_json(file)] if file.is_file() else []


def _note_json(note: Message) -> dict[str, Any]:
    params = {key: _note_json(value) if isinstance(value, Message) else value for key, value in note.params.items()}
    return {"key": note.key, "params": params}


def _note(value: Mapping[str, Any]) -> Message:
    params = {key: _note(inner) if isinstance(inner, dict) else inner for key, inner in value["params"].items()}
    return Message(value["key"], params)
