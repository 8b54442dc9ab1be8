"""Training on this machine: its GPUs, and the command that trains here. Another launcher (a cluster's) would stand beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.environment.interpreters import is_legacy
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


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine. Without a driver or pynvml there are none, which is no error."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


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


def _gpu(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
    return Gpu(index, str(uuid), str(name), int(memory.total), int(memory.used))
