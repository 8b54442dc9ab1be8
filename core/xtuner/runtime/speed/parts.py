"""The parts of the speed layer: what each is called, and the report of which ran and why the others did not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

FAST_PASS: Final = "fast_pass"
BLOCK_ATTENTION: Final = "block_attention"
GROUPED: Final = "grouped_micro_batches"
RECOMPUTE: Final = "selective_recomputation"
NORM: Final = "norm_kernel"
ROTARY: Final = "rotary_kernel"
SWIGLU: Final = "swiglu_kernel"
UNPACKED: Final = "unpacked_weights"
OPTIMIZER: Final = "fused_optimizer"

ALL: Final[Mapping[str, str]] = {
    FAST_PASS: "fused output layer and loss without full logits, fused LoRA products, frozen weights cast once, flash attention",
    BLOCK_ATTENTION: "packed samples do not see each other; positions start anew in each",
    GROUPED: "the micro-batches of an accumulation computed together, without padding",
    RECOMPUTE: "activations kept as far as memory allows instead of computed twice",
    NORM: "RMSNorm and the residual addition in one kernel",
    ROTARY: "splitting heads and rotary positions in one kernel",
    SWIGLU: "SwiGLU in one kernel, its result not kept",
    UNPACKED: "4-bit weights unpacked once, where memory allows",
    OPTIMIZER: "AdamW in one kernel",
}
"""What each part does, for the log."""


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

    def __contains__(self, part: str) -> bool:
        return part in self.parts


@dataclass(frozen=True, slots=True)
class PartReport:
    """What became of one part."""

    name: str
    applied: bool
    note: str
    """How it runs (sizes), or why it was left out."""

    def line(self) -> str:
        return f"speed: {self.name} {'on' if self.applied else 'left out'}: {self.note}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Reports:
    """Collects one report a part."""

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._reports: dict[str, PartReport] = {}

    def on(self, part: str, note: str = "") -> None:
        self._reports[part] = PartReport(part, True, note or ALL[part])

    def off(self, part: str, why: str) -> None:
        self._reports[part] = PartReport(part, False, why)

    def finish(self, why: str) -> Sequence[PartReport]:
        """One report for each part; those that nothing was said of get `why`, or that they were not asked for."""
        for part in ALL:
            if part not in self._reports:
                self.off(part, why if part in self._wish else "not asked for")
        return [self._reports[part] for part in ALL]
