"""A copy in memory of what a checkpoint holds, taken while training stands still, so that it can be written while training goes on.

Knows what mmengine's runner and DeepSpeed's engine would write and how much memory a copy takes; not where it goes or when.
"""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from core.environment.probe import memory

_RESERVE_BYTES: Final = 2**30
"""Left free beside each rank's copy: what torch.save, the data loader and the rest of the machine need meanwhile."""
_MOST_PINNED: Final = 0.25
"""Share of the free memory that may be page-locked: pages that can never be swapped out are a burden to everything else."""

Files: TypeAlias = dict[Path, Any]
"""What each file of a checkpoint holds."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is to be written. `is_copy`: training may change the tensors meanwhile."""

    files: Files
    is_copy: bool
    own_bytes: int
    """What the tensors of this rank take."""
    need_bytes: int
    """What those of all ranks take."""
    available_bytes: int | None
    """Of memory, when it was taken; None if the machine does not say."""
    copied: Any = None
    """A CUDA event after the last copy into pinned memory; None where nothing is under way."""

    def write(self) -> None:
        """Every file. For the thread that writes: it waits for the copies. Raises OSError."""
        if self.copied is not None:
            self.copied.synchronize()
        for file, content in self.files.items():
            dump(content, file)


def take(files: Files, *, reusable_bytes: int = 0, gather: Callable[[Any], list[Any]]) -> Snapshot:
    """A copy of `files`, or `files` themselves if memory is short.

    reusable_bytes: pinned memory of an earlier snapshot, which torch keeps for the next one. gather: what every rank of this
    machine says, where each copies its part of a checkpoint: they share the memory, so that all of them copy, or none.
    """
    distinct = {_key(tensor): tensor for tensor in tensors(files)}
    own = sum(tensor.nbytes for tensor in distinct.values())
    needs, frees, reusables = zip(*gather([own, memory()["available_bytes"], reusable_bytes]), strict=True)
    need, reusable = sum(needs), sum(reusables)
    available = min((free for free in frees if free is not None), default=None)
    if available is not None and need + _RESERVE_BYTES * len(needs) > available + reusable:
        return Snapshot(files, False, own, need, available)
    is_pinned = torch.cuda.is_available() and (available is None or need < _MOST_PINNED * available + reusable)
    copies = {key: _copy(tensor, is_pinned=is_pinned) for key, tensor in distinct.items()}
    known = {id(tensor): copies[_key(tensor)] for tensor in tensors(files)}
    held = {file: copy.deepcopy(content, known) for file, content in files.items()}
    return Snapshot(held, True, own, need, available, _mark() if is_pinned else None)


def of_runner(save: Callable[[], None], file: Path) -> Files:
    """What mmengine's runner would write into `file` when it is told to `save`; nothing on a rank that writes nothing."""
    from mmengine.runner import runner as room

    files: Files = {}

    def take_over(checkpoint: dict[str, Any], *_arguments: Any, **_options: Any) -> None:
        files[file] = checkpoint

    def as_it_is(value: Any, *_arguments: Any) -> Any:
        return value

    # mmengine brings every tensor to the CPU one by one, waiting for each; ours leave together.
    kept = room.save_checkpoint, room.weights_to_cpu, room.apply_to
    room.save_checkpoint, room.weights_to_cpu, room.apply_to = take_over, as_it_is, as_it_is
    try:
        save()
    finally:
        room.save_checkpoint, room.weights_to_cpu, room.apply_to = kept
    return files


def of_engine(save: Callable[[], None], engine: Any) -> Files:
    """What DeepSpeed's `engine` would write on this rank. It makes the folder and puts its own script there itself.

    Without the optimizer's states it is mmengine that writes, on rank 0, one file.
    """
    from mmengine._strategy import deepspeed as room

    files: Files = {}

    def take_over(state_dict: Any, path: str) -> None:
        files[Path(path)] = state_dict

    writer = engine.checkpoint_engine
    kept = writer.save, room.save_checkpoint
    writer.save = room.save_checkpoint = take_over
    try:
        save()
    finally:
        writer.save, room.save_checkpoint = kept
    return files


def is_plain(engine: Any) -> bool:
    """Whether DeepSpeed writes by torch.save, a file by one rank: other writers of its config let several ranks write into one file."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    return isinstance(engine.checkpoint_engine, TorchCheckpointEngine)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


def dump(content: Any, file: Path) -> None:
    """torch.save onto the disk, but what went wrong with the file is raised.

    torch finishes its archive even after a write has failed; that second failure ("unexpected pos") would hide the first.
    """
    with open(file, "wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        stream.flush()
        os.fsync(stream.fileno())


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Tensors that look at the same numbers (tied weights) are one."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _copy(tensor: torch.Tensor, *, is_pinned: bool) -> torch.Tensor:
    """On the CPU. From a GPU into pinned memory the copy is only begun: the next step waits for it there, not here."""
    is_pinned = is_pinned and tensor.device.type == "cuda"
    made = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned, requires_grad=False)
    return made.copy_(tensor.detach(), non_blocking=is_pinned)


def _mark() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event
