"""How long a training will take and what it will cost: from the pace of earlier runs on this card, else from a stated guess."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from core.config.edits import method_of
from core.config.findings import Context, iterations_per_epoch, number
from core.config.memory.comparison import card_among
from core.config.memory.shape import read_shape
from core.config.source import ConfigSource
from core.config.validation import added_time
from core.errors import DanluError
from core.files import read_json, write_json
from core.models.inspect import fingerprint
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.jobs import Listed
from core.runs.metrics import merge_resumes, parse
from core.runs.pace import ask_all
from core.runs.progress import tokens_per_second
from core.runs.utilisation import peak_flops

_TAIL_BYTES: Final = 256 * 1024
_RUNS_ASKED: Final = 30
_RUNS_MEASURED: Final = 5
_CARDS_KEPT: Final = 1000
_WARM_STEPS: Final = 4
_UTILISATION: Final = {False: (0.15, 0.4), True: (0.3, 0.6)}
"""Share of that which a training reaches: stock, and with the speed layer. A guess, and said to be one."""


@dataclass(frozen=True, slots=True)
class Duration:
    """A training's size and time. None where it cannot be known before the data is read, or nothing is known of the machine."""

    iterations: tuple[int, int]
    """Fewest and most micro-steps of each rank."""
    updates: tuple[int, int]
    """Optimizer steps."""
    tokens_per_update: int
    """Of all ranks, padding included."""
    seconds: tuple[float, float] | None
    basis: str
    """`runs` (measured on this card), `guess` (data sheet) or `unknown`."""
    runs: tuple[str, ...] = ()
    """Ids of the runs it was measured in."""

    def cost(self, rate_per_hour: float, cards: int) -> tuple[float, float] | None:
        """Least and most, in the currency of the rate, which is for one card."""
        if self.seconds is None:
            return None
        low, high = (seconds / 3600 * rate_per_hour * max(1, cards) for seconds in self.seconds)
        return low, high


def estimate_duration(
    runs: Sequence[Listed], source: ConfigSource, context: Context, *, card: str | None, is_fast: bool
) -> Duration | None:
    """`runs`: those of the project, the latest first. `card`: name of the GPU, None on a CPU. None without a data file."""
    per_epoch = iterations_per_epoch(source, context)
    epochs = source.effective("max_epochs")
    if per_epoch is None or not isinstance(epochs, int | float):
        return None
    counts = max(1, int(number(source, "accumulative_counts", 1)))
    few, most = (max(1, round(count * epochs)) for count in per_epoch)
    micro = int(number(source, "batch_size", 1) * number(source, "max_length", 2048) * context.world_size)
    size = ((few, most), (max(1, few // counts), max(1, most // counts)), micro * counts)
    all_of_it = 1 + added_time(source, context)
    paces = _measured(runs, source, context, card)
    if paces:
        pace = statistics.median(paces.values())
        return Duration(*size, (few * micro / pace * all_of_it, most * micro / pace * all_of_it), "runs", tuple(paces))
    guess = _guess(source, context, card, is_fast=is_fast)
    if guess is None:
        return Duration(*size, None, "unknown")
    slow, fast = guess
    return Duration(*size, (few * micro / fast * all_of_it, most * micro / slow * all_of_it), "guess")


def _measured(runs: Sequence[Listed], source: ConfigSource, context: Context, card: str | None) -> dict[str, float]:
    """Tokens a second of the latest runs with this model, method, card and number of ranks; run id → pace."""
    if context.model is None:
        return {}
    wanted = {"method": method_of(source), "world_size": context.world_size, "deepspeed": context.deepspeed}
    model = fingerprint(context.model.path)
    found: dict[str, float] = {}
    asked = list(runs[:_RUNS_ASKED])
    for listed, spec in zip(asked, ask_all(Listed.spec, asked), strict=True):
        if spec is None or any(spec.details.get(key) != value for key, value in wanted.items()):
            continue
        if (spec.details.get("base_model") or {}).get("fingerprint") != model or _card(listed.run, spec) != card:
            continue
        pace = _pace(listed.run.metrics_file)
        if pace is not None:
            found[listed.run.id] = pace
        if len(found) == _RUNS_MEASURED:
            break
    return found


def _card(run: RunDirectory, spec: RunSpec) -> str | None:
    try:
        return _noted_card(run, tuple(spec.gpus), spec.created_at) if spec.gpus else None
    except LookupError:
        return None


@lru_cache(maxsize=_CARDS_KEPT)
def _noted_card(run: RunDirectory, gpus: tuple[str, ...], created_at: str) -> str:
    """Once the run's supervisor has noted it, it stays. Raises LookupError before that, which is not remembered."""
    del created_at  # tells a run from another one of its name
    found = card_among(run, gpus)
    if found is None:
        raise LookupError(run.id)
    return found.name


def _pace(file: Path) -> float | None:
    """Tokens a second over the last steps, the first ones left out; None before there are some."""
    try:
        with open(file, "rb") as stream:
            stream.seek(0, 2)
            size = stream.tell()
            stream.seek(max(0, size - _TAIL_BYTES))
            block = stream.read()
    except OSError:
        return None
    rows = parse(block[block.find(b"\n") + 1 :] if size > _TAIL_BYTES else block)
    metrics = merge_resumes(rows[_WARM_STEPS:])
    return tokens_per_second(metrics, recent=None) if len(metrics) else None


def _guess(source: ConfigSource, context: Context, card: str | None, *, is_fast: bool) -> tuple[float, float] | None:
    """Tokens a second at least and at most: 2 operations a parameter forward, 2 or 4 backward, 2 again with checkpointing.

    Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361), section 2.1; frozen weights need no gradient of their own.
    """
    peak = peak_flops(card) if card else None
    if peak is None or context.model is None:
        return None
    try:
        parameters = read_shape(context.model.path).parameters
    except DanluError:
        return None
    backward = 4 if method_of(source) == "full" else 2
    again = 0 if is_fast or source.get("model.use_activation_checkpointing", True) is False else 2
    pace = peak * context.world_size / ((2 + backward + again) * parameters)
    low, high = _UTILISATION[is_fast]
    return pace * low, pace * high


def rate(project: Project, card: str) -> float:
    """Price of an hour of this card, as it was entered; 0 if it was not."""
    value = _rates(project).get(card, 0.0)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0.0


def set_rate(project: Project, card: str, rate_per_hour: float) -> None:
    write_json(_rates_file(project), {**_rates(project), card: rate_per_hour})


def _rates_file(project: Project) -> Path:
    return project.private / "prices.json"


def _rates(project: Project) -> dict[str, Any]:
    try:
        value = read_json(_rates_file(project)) if _rates_file(project).is_file() else {}
    except DanluError:
        return {}
    return value if isinstance(value, dict) else {}


def names(runs: Sequence[str]) -> str:
    """Ids of runs for a sentence, at most three."""
    return ", ".join(runs[:3]) + (" …" if len(runs) > 3 else "")
