"""Saves checkpoints so that one that was not finished is never taken for one that was. Runs in the trainer's process.

Without DeepSpeed they are written behind the training: the step waits for a copy in memory, not for the disk.
"""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import CheckpointHook

from core.files import write_text

PARTIAL: Final = ".partial"
"""Ends the (hidden) name of what is being written or removed: no reader takes it for a checkpoint."""
_RANDOM: Final = "danlu_random_state"


class WholeCheckpointHook(CheckpointHook):  # type: ignore[misc]
    """mmengine's CheckpointHook, but: written under another name, renamed when whole, and old ones removed only after that.

    mmengine removes the oldest checkpoint before it writes the new one; with `max_keep_ckpts=1` a kill in between leaves
    nothing. The state of the random generators is saved too, so that a resumed run draws the same dropout masks.

    What fails while it writes behind the training (a full disk) is raised at the next iteration, save or end.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._restored: dict[str, Any] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.saved_iteration: int | None = None
        """Iteration of the last checkpoint of this process."""

    def save_now(self, runner: Any) -> None:
        """Save after the current iteration, unless that is done already."""
        if self.saved_iteration != runner.iter + 1:
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._save_checkpoint(runner)

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        if runner.iter > 0 and _RANDOM in runner.message_hub.runtime_info:
            self._restored = runner.message_hub.get_info(_RANDOM)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The first iteration after a resume: put the generators where they were, after all that drew from them at the start."""
        del runner, batch_idx, data_batch
        if self._restored is not None:
            restore_random_state(self._restored)
            self._restored = None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._writing is not None and self._writing.done():
            self.wait()
        super().after_train_iter(runner, batch_idx, data_batch=data_batch, outputs=outputs)

    def after_train(self, runner: Any) -> None:
        self.wait()
        self._pool.shutdown()
        super().after_train(runner)

    def wait(self) -> None:
        """Until the last checkpoint is whole on the disk. Raises what its writing raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        name = self.filename_tmpl.format(step)
        target, partial = Path(self.out_dir) / name, Path(self.out_dir) / f".{name}{PARTIAL}"
        stale = self._remember(runner, step)
        self.last_ckpt = str(target)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        # The hub is saved with plain and DeepSpeed checkpoints alike, and rank 0's states are every rank's.
        runner.message_hub.update_info(_RANDOM, random_state())
        if type(runner).__name__ == "Runner":
            self._save_behind(runner, partial, target, stale, meta)
        else:  # DeepSpeed: every rank writes, and the engine gathers while it does
            write_whole(partial, target, lambda: self._save(runner, partial.name, meta))
            if is_main_process():
                self._note(runner.work_dir, target, stale)
        self.saved_iteration = step

    def _save_behind(self, runner: Any, partial: Path, target: Path, stale: list[int], meta: dict[str, Any]) -> None:
        """Copy what the checkpoint holds, and let it be written while training goes on. One at a time."""
        self.wait()
        held = capture(lambda: self._save(runner, partial.name, meta))
        if held is None:
            return
        work_dir = runner.work_dir

        def write() -> None:
            write_alone(partial, target, lambda: torch.save(held, partial))
            self._note(work_dir, target, stale)

        self._writing = self._pool.submit(write)

    def _note(self, work_dir: str, target: Path, stale: list[int]) -> None:
        write_text(Path(work_dir) / "last_checkpoint", str(target))
        for old in stale:
            remove(Path(self.out_dir) / self.filename_tmpl.format(old))

    def _save(self, runner: Any, name: str, meta: dict[str, Any]) -> None:
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )

    def _remember(self, runner: Any, step: int) -> list[int]:
        """Note `step` among those kept; returns the steps that are too many now."""
        if self.max_keep_ckpts <= 0:
            return []
        kept = [old for old in self.keep_ckpt_ids if old != step] + [step]
        stale, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
        self.keep_ckpt_ids.clear()
        self.keep_ckpt_ids.extend(kept)
        runner.message_hub.update_info("keep_ckpt_ids", list(kept))
        return stale


def capture(save: Callable[[], None]) -> dict[str, Any] | None:
    """What mmengine's runner would write when it is told to `save`, safe from changes; None where it writes nothing (rank > 0)."""
    from mmengine.runner import runner as room

    taken: list[dict[str, Any]] = []

    def take(checkpoint: dict[str, Any], *_arguments: Any, **_options: Any) -> None:
        taken.append(checkpoint)

    kept, room.save_checkpoint = room.save_checkpoint, take
    try:
        save()
    finally:
        room.save_checkpoint = kept
    if not taken:
        return None
    # On a GPU mmengine has copied the tensors to the CPU already; there they are the live ones, which the next step changes.
    known = {id(tensor): tensor for tensor in tensors(taken[0])} if torch.cuda.is_available() else {}
    held: dict[str, Any] = copy.deepcopy(taken[0], known)
    return held


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


def write_alone(partial: Path, target: Path, write: Callable[[], None]) -> None:
    """Let this process `write` to `partial`, then give it its name. What a failed write left is removed."""
    remove(partial)
    try:
        write()
    except BaseException:
        remove(partial)
        raise
    _flush(partial)
    partial.replace(target)


def write_whole(partial: Path, target: Path, write: Callable[[], None]) -> None:
    """Let every rank `write` to `partial`, then give it its name. What a failed write left is removed."""
    if is_main_process():
        remove(partial)
    barrier()
    try:
        write()
    except BaseException:
        if is_main_process():
            remove(partial)
        raise
    barrier()
    if is_main_process():
        _flush(partial)
        if target.is_dir():
            remove(target)
        partial.replace(target)
    barrier()


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, so that a kill in the middle leaves nothing under its name."""
    if path.is_dir():
        doomed = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.removed{PARTIAL}"))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """States of the generators that training draws from, on the CPU and the current GPU."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _flush(path: Path) -> None:
    """Onto the disk before the rename: after a power cut the name must not stand for an empty file."""
    for file in [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
