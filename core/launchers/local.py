"""Training on this machine: its GPUs, and the command that trains here. Another launcher (a cluster's) would stand beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.environment.interpreters import is_legacy
from core.gpu import devices
from core.runs.devices import holders
from core.xtuner.command import free_port, training_argv, training_env


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as NVML sees it."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Command:
    """What starts training: argv, and what is added to the environment."""

    argv: list[str]
    env: dict[str, str]


def list_gpus(library: Any = None) -> list[Gpu]:
    """What can train here: cards, or the slices of one that is cut by MIG. Without a driver or pynvml there are none, which is no error.

    A card that does not say who it is or what memory it has is lost, and left out. `library`: as for `core.gpu.devices`.
    """
    return [
        Gpu(found.index, found.uuid, found.name or "", found.memory_total_bytes, found.memory_used_bytes or 0)
        for found in devices(library)
        if found.uuid is not None and found.memory_total_bytes is not None
    ]


def idle_gpu() -> str | None:
    """UUID of the GPU to take when nobody chose one: held by no run if there is such a one, then the most free memory."""
    held = {holder.device for holder in holders()}
    best = min(list_gpus(), key=lambda gpu: (gpu.uuid in held, gpu.used_bytes - gpu.memory_bytes), default=None)
    return None if best is None else best.uuid


def command(python: str, run_folder: Path, *, gpus: Sequence[str], world_size: int, is_local: bool) -> Command:
    """On this machine. gpus: UUIDs or indices, one process each; none: `world_size` processes on the CPU."""
    argv = training_argv(
        python, run_folder, world_size=world_size, port=free_port(), needs_torchrun=is_legacy(Path(python))
    )
    return Command(argv, training_env(gpus=gpus, world_size=world_size, is_local=is_local))
