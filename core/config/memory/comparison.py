"""A run's estimate against the peak it reached: read from the run's own copy of its config, its metrics and its first GPU sample."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.config.deepspeed import zero_of
from core.config.library import read_config
from core.config.memory.budget import Budget, read_budget
from core.config.memory.measured import Key, remember
from core.config.memory.setup import Setup, Start
from core.config.source import ConfigSource
from core.errors import DanluError
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.metrics import Metrics
from core.xtuner.runtime.speed.parts import Wish


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU of a run, as it was when the run began to be watched."""

    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was to be expected of a run, without any correction from earlier ones."""

    budget: Budget
    card: Card
    key: Key
    accumulation: int


def estimate_of(run: RunDirectory) -> Estimate | None:
    """None for a run on a CPU, one made by hand, or one whose model is no longer there."""
    card = card_of(run)
    if card is None:
        return None
    try:
        details = run.spec().details
        source = ConfigSource(read_config(run.source / f"{details['config']['name']}.py"))
        budget = read_budget(source, start_of(details), free_bytes=card.total_bytes)
        model = str(details["base_model"]["fingerprint"])
    except (DanluError, KeyError, TypeError, OSError):
        return None
    key = Key(model, card.name, way(budget.setup))
    return Estimate(budget, card, key, int(details.get("accumulative_counts") or 1))


def measured_bytes(estimate: Estimate, metrics: Metrics) -> int | None:
    """Highest `torch.cuda.max_memory_allocated` of rank 0; None before the second optimizer step, when not everything lies there yet."""
    memory = metrics["memory_bytes"]
    known = memory[np.isfinite(memory)]
    return int(known.max()) if len(known) and len(metrics) >= 2 * estimate.accumulation else None


def learn(project: Project, run: RunDirectory, estimate: Estimate, measured: int) -> None:
    """Remember what a run took, for its model, card and way to train."""
    remember(
        project,
        estimate.key,
        run=run.id,
        estimated_bytes=estimate.budget.allocated_bytes,
        measured_bytes=measured,
    )


def start_of(details: Mapping[str, Any]) -> Start:
    """How a run was started, from its run.json."""
    deepspeed = details.get("deepspeed")
    return Start(
        world_size=int(details.get("world_size") or 1),
        deepspeed=str(deepspeed) if deepspeed else None,
        zero=zero_of(details) if deepspeed else None,
        has_flash_attention=importlib.util.find_spec("flash_attn") is not None,
        wish=Wish.from_json(details.get("speed") or "off"),
    )


def way(setup: Setup) -> str:
    """How a model is trained, as far as the formula has terms of its own for it."""
    return f"{setup.method}/{setup.engine}{'/fast' if setup.is_fast else ''}"


def card_of(run: RunDirectory) -> Card | None:
    """The first GPU that a run was given, from the first line of its gpu.jsonl."""
    try:
        return card_among(run, run.spec().gpus)
    except DanluError:
        return None


def card_among(run: RunDirectory, wanted: Sequence[str]) -> Card | None:
    """The same, where its GPUs (UUIDs or indices) are known."""
    try:
        with open(run.gpu_file, encoding="utf-8") as stream:
            gpus = json.loads(stream.readline()).get("gpus", [])
    except (OSError, ValueError):
        return None
    for gpu in gpus:
        is_wanted = gpu.get("uuid") in wanted or str(gpu.get("index")) in wanted
        if is_wanted and gpu.get("name") and gpu.get("memory_total_bytes"):
            return Card(str(gpu["name"]), int(gpu["memory_total_bytes"]))
    return None
