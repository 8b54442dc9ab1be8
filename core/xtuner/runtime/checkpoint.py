"""Saves checkpoints so that one that was not finished is never taken for one that was. Runs in the trainer's process."""

import os
import shutil
from collections.abc import Callable
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
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._restored: dict[str, Any] | None = None
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

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        name = self.filename_tmpl.format(step)
        target, partial = Path(self.out_dir) / name, Path(self.out_dir) / f".{name}{PARTIAL}"
        stale = self._remember(runner, step)
        self.last_ckpt = str(target)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        # The hub is saved with plain and DeepSpeed checkpoints alike, and rank 0's states are every rank's.
        runner.message_hub.update_info(_RANDOM, random_state())
        write_whole(partial, target, lambda: self._save(runner, partial.name, meta))
        self.saved_iteration = step
        if is_main_process():
            write_text(Path(runner.work_dir) / "last_checkpoint", str(target))
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
