"""How the checkpoints of a run were saved: `saving.json`, written by the trainer. Stdlib only; saves nothing itself."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import InputError
from core.files import read_json

SAVING_FILE: Final = "saving.json"


@dataclass(slots=True)
class Saving:
    """Checkpoints of one attempt at a run."""

    count: int = 0
    behind: int = 0
    """Of them, how many were written while training went on."""
    waited_seconds: float = 0.0
    """Training stood still in all: for the copies, or for the writing."""
    why: str | None = None
    """Why training stood still for the writing: `memory`, `deepspeed` (on several machines) or `writer` (DeepSpeed's own)."""

    def add(self, waited_seconds: float, *, is_behind: bool) -> None:
        self.count += 1
        self.behind += is_behind
        self.waited_seconds += waited_seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "waited_seconds": round(self.waited_seconds, 3)}


def read_saving(run: Path) -> Saving | None:
    """What saving.json of a run folder says; None if there is none (yet) or it is not ours."""
    try:
        return Saving(**read_json(run / SAVING_FILE))
    except (InputError, TypeError):
        return None
