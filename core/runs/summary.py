"""One row about a training run, for lists and comparison. Reads the run's files; starts and changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from core.errors import DanluError
from core.runs.directory import RunDirectory
from core.runs.metrics import Metrics
from core.runs.notes import Notes, read_notes
from core.runs.progress import recent_loss, tokens_per_second
from core.runs.state import RunStatus, read_status
from core.runs.validation import read_validation


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a person compares runs by. None where it is not known."""

    run: RunDirectory
    status: RunStatus
    title: str
    config: str | None
    base_model: str | None
    data: str | None
    iteration: int
    total_iterations: int | None
    loss: float | None
    """`core.runs.progress.recent_loss` at its end."""
    elapsed_seconds: float | None
    """Of all attempts."""
    tokens_per_second: float | None
    """Over all its steps."""
    peak_memory_bytes: float | None
    """As the trainer saw it, on one GPU; else as NVML saw it."""
    tokens: float | None
    """Trained on so far."""
    energy_kwh: float | None
    validation_loss: float | None
    """The best one."""
    notes: Notes
    is_ours: bool


def summarize(run: RunDirectory, metrics: Metrics, status: RunStatus | None = None) -> RunSummary:
    """The row of `run`. A run.json that cannot be read leaves its columns empty."""
    import numpy as np

    status = status or read_status(run)
    is_ours = run.spec_file.exists()
    title, details = run.id, {}
    if is_ours:
        try:
            spec = run.spec()
            title, details = spec.title, spec.details
        except DanluError:
            details = {}
    memory = metrics["memory_bytes"][np.isfinite(metrics["memory_bytes"])]
    total = metrics.last("total_iterations")
    return RunSummary(
        run=run,
        status=status,
        title=title,
        config=_text(details.get("config"), "name"),
        base_model=_name(_text(details.get("base_model"), "path")),
        data=", ".join(filter(None, (_name(_text(part, "path")) for part in details.get("data") or []))) or None,
        iteration=int(metrics["iteration"][-1]) if len(metrics) else 0,
        total_iterations=None if total is None else int(total),
        loss=recent_loss(metrics),
        elapsed_seconds=status.total_seconds(),
        tokens_per_second=tokens_per_second(metrics, recent=None) if len(metrics) else None,
        peak_memory_bytes=float(memory.max()) if len(memory) else status.peak_gpu_bytes or None,
        tokens=float(np.nansum(metrics["tokens"])) if metrics.has("tokens") else None,
        energy_kwh=status.energy_joules / 3.6e6 if status.energy_joules else None,
        validation_loss=min((loss for _, loss in read_validation(run)), default=None),
        notes=read_notes(run),
        is_ours=is_ours,
    )


def _text(value: object, key: str) -> str | None:
    found: Any = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, str) else None


def _name(path: str | None) -> str | None:
    return PurePath(path).name if path else None
