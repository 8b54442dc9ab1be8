"""What a person asks for when they start a training. Plain values, to JSON and back; judges nothing."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from core.launchers.nodes import NodesWish
from core.launchers.slurm import SlurmWish
from core.runs.resume import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What a person chose on the launch page."""

    config: Path
    """The config to train with; the run gets its own copy."""
    gpus: tuple[str, ...] = ()
    """UUIDs or indices, one process each. None: CPU."""
    cpu_processes: int = 1
    """World size on CPU."""
    slurm: SlurmWish | None = None
    """Train on a cluster instead of this machine."""
    nodes: NodesWish | None = None
    """Train on this and other machines."""
    deepspeed: str | None = None
    """Name of one of XTuner's own (`deepspeed_zero2`, …), of the project's or of a run's copy (`core.config.deepspeed`), or none."""
    resume: Path | None = None
    """A checkpoint to go on from."""
    resume_mode: Mode = Mode.EXACT
    extra_epochs: float = 0
    """Epochs beyond those that the run of the checkpoint was planned for."""
    seed: int | None = 42
    """Of a resumed run the checkpoint's seed holds."""
    name: str = ""
    """Folder name of the run; empty: made from the time."""
    speed: str | dict[str, Any] = "auto"
    """What `core.xtuner.runtime.speed.parts.Wish` reads."""
    python: str = field(default=sys.executable)
    """The interpreter that trains."""

    @property
    def world_size(self) -> int:
        several = self.slurm or self.nodes
        return several.world_size if several else len(self.gpus) or self.cpu_processes

    @property
    def gpu_count(self) -> int:
        """On one machine."""
        several = self.slurm or self.nodes
        if several:
            return several.processes if several.has_gpus else 0
        return len(self.gpus)

    @property
    def own_gpus(self) -> list[str]:
        """Of this machine, which no other run may have meanwhile."""
        return [str(number) for number in range(self.gpu_count)] if self.nodes else list(self.gpus)

    def to_json(self) -> dict[str, Any]:
        value = {**asdict(self), "config": str(self.config), "gpus": list(self.gpus)}
        return {**value, "resume": str(self.resume) if self.resume else None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        resume = Path(value["resume"]) if value.get("resume") else None
        mode = Mode(value.get("resume_mode", Mode.EXACT))
        wish = SlurmWish.from_json(value["slurm"]) if value.get("slurm") else None
        nodes = NodesWish.from_json(value["nodes"]) if value.get("nodes") else None
        places = {
            "config": Path(value["config"]),
            "resume": resume,
            "resume_mode": mode,
            "slurm": wish,
            "nodes": nodes,
        }
        return cls(**{**value, **places, "gpus": tuple(value.get("gpus") or ())})
