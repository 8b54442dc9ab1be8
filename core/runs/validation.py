"""Reads what a run wrote about its validation: the losses, the best checkpoint, whether it ended early. Stdlib only; knows no charts."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.runs.directory import RunDirectory
from core.runs.samples import LineReader

_TAIL_BYTES: Final = 4096
_LONGEST_SECONDS: Final = 3600.0
"""A validation that takes longer than this hangs, for all we know."""


@dataclass(frozen=True, slots=True)
class Validated:
    """One validation."""

    iteration: int
    """0: before the first step."""
    loss: float
    """Mean over the predicted tokens."""
    is_best: bool
    """Lower than all before."""
    patience: int
    ends: bool
    """Training ends early because of it."""


@dataclass(frozen=True, slots=True)
class Best:
    """The validation with the lowest loss, and its checkpoint if there is one."""

    iteration: int
    loss: float
    checkpoint: Path | None


def read_validations(run: RunDirectory) -> list[Validated]:
    """In their order, rising; where a resume went back, only what came after it. A loss that is no number is left out."""
    found: list[Validated] = []
    for value in LineReader(run.validation_file).refresh():
        iteration, loss = value.get("iteration"), value.get("loss")
        if not isinstance(iteration, int) or not isinstance(loss, int | float) or not math.isfinite(loss):
            continue
        while found and found[-1].iteration >= iteration:
            found.pop()
        found.append(_validated(value, iteration, float(loss)))
    return found


def read_validation(run: RunDirectory) -> list[tuple[int, float]]:
    """(iteration, validation loss), rising."""
    return [(each.iteration, each.loss) for each in read_validations(run)]


def best_of(run: RunDirectory) -> Best | None:
    """What the run itself took for the best; None without validation."""
    best = next((each for each in reversed(read_validations(run)) if each.is_best), None)
    if best is None:
        return None
    paths = (run.path / f"iter_{best.iteration}{suffix}" for suffix in (".pth", ""))
    return Best(best.iteration, best.loss, next((path for path in paths if path.exists()), None))


def best_among(checkpoints: Iterable[Path]) -> dict[Path, float]:
    """Those that are the best of their run, with the validation loss they have."""
    chosen = list(checkpoints)
    found = (best_of(RunDirectory(folder)) for folder in {path.parent for path in chosen})
    return {best.checkpoint: best.loss for best in found if best is not None and best.checkpoint in chosen}


def early_end(run: RunDirectory) -> Validated | None:
    """The validation after which the run ended early; None if it did not."""
    last = next(reversed(read_validations(run)), None)
    return last if last is not None and last.ends else None


def is_validating(run: RunDirectory, now: float) -> bool:
    """Whether the newest line says that a validation has begun, within the last hour. Reads the end of the file only."""
    try:
        with open(run.validation_file, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            line = json.loads(stream.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    begun_at = line.get("begun_at") if isinstance(line, dict) else None
    return isinstance(begun_at, int | float) and 0 <= now - begun_at < _LONGEST_SECONDS


def _validated(value: Mapping[str, Any], iteration: int, loss: float) -> Validated:
    patience = value.get("patience")
    return Validated(
        iteration,
        loss,
        is_best=value.get("is_best") is True,
        patience=patience if isinstance(patience, int) else 0,
        ends=value.get("ends") is True,
    )
