"""Saves checkpoints so that one that was not finished is never taken for one that was. Runs in the trainer's process.

They are written behind the training: the step waits for a copy in memory, not for the disk. With DeepSpeed every rank writes its
part, and their threads tell one another when it is done. Not on several machines, whose folders may be on different disks. Nor
where memory is short of a copy.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import CheckpointHook

from core.files import write_json, write_text
from core.runs.saving import SAVING_FILE, Saving
from core.xtuner.runtime import snapshot
from core.xtuner.runtime.ranks import Alone, Ranks, is_one_machine, new_group
from core.xtuner.runtime.whole import PARTIAL, remove, remove_unfinished, write_together, write_whole

_RANDOM: Final = "danlu_random_state"
_BEST: Final = "danlu_best"
"""In the message hub: the iteration of the best checkpoint, and which ones were saved only for being the best."""
_REASONS: Final = {
    "deepspeed": "the ranks of several machines save together",
    "writer": "the DeepSpeed config names a writer of its own",
}


class WholeCheckpointHook(CheckpointHook):  # type: ignore[misc]
    """mmengine's CheckpointHook, but: written under another name, renamed when whole, and old ones removed only after that.

    mmengine removes the oldest checkpoint before it writes the new one; with `max_keep_ckpts=1` a kill in between leaves
    nothing. The state of the random generators is saved too, so that a resumed run draws the same dropout masks.

    The best checkpoint by validation loss is kept beside the `max_keep_ckpts` newest.

    What fails while it writes behind the training (a full disk) is raised at the next iteration, save or end, on every rank that wrote.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._restored: dict[str, Any] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saving = Saving()
        self._reusable_bytes = 0
        self._ranks: Ranks | Alone = Alone()
        """With whom a checkpoint is written behind the training."""
        self._must_wait: str | None = None
        """Why it is not."""
        self.saved_iteration: int | None = None
        """Iteration of the last checkpoint of this process."""
        self._best: int | None = None
        self._beside: list[int] = []
        """Iterations that were saved, or kept, only for being the best."""

    def mark_best(self, runner: Any, iteration: int) -> None:
        """The checkpoint of this iteration is to be kept as the best so far; it is saved with the hooks of its step."""
        self._recall(runner)
        self._best = iteration
        runner.message_hub.update_info(_BEST, [iteration, *self._beside])

    def save_now(self, runner: Any) -> None:
        """Save after the current iteration, unless that is done already."""
        if self.saved_iteration != runner.iter + 1:
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._save_checkpoint(runner)

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        if is_main_process():
            remove_unfinished(Path(self.out_dir))
        self._meet(runner)
        if runner.iter > 0 and _RANDOM in runner.message_hub.runtime_info:
            self._restored = runner.message_hub.get_info(_RANDOM)
        self._recall(runner)

    def _meet(self, runner: Any) -> None:
        """Find out how the ranks of DeepSpeed save, the same on all."""
        engine = engine_of(runner)
        if engine is None or get_world_size() == 1:
            return
        if not snapshot.is_plain(engine):
            self._must_wait = "writer"
        elif not is_one_machine():
            self._must_wait = "deepspeed"
        else:
            self._ranks = Ranks(new_group())

    def _recall(self, runner: Any) -> None:
        """What a resumed checkpoint knew of the best, before anything new is noted: hooks that begin sooner may mark one."""
        if _BEST in runner.message_hub.runtime_info:
            self._best, *self._beside = runner.message_hub.get_info(_BEST)

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
        step = runner.iter + 1
        if self._best == step != self.saved_iteration:
            self._beside.append(step)
            runner.message_hub.update_info(_BEST, [step, *self._beside])
            self.save_now(runner)

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
        if step == self.saved_iteration:  # Saved already in this step, for a reason of its own.
            return
        begun = time.perf_counter()
        name = self.filename_tmpl.format(step)
        target, partial = Path(self.out_dir) / name, Path(self.out_dir) / f".{name}{PARTIAL}"
        stale = self._remember(runner, step)
        self.last_ckpt = str(target)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        # The hub is saved with plain and DeepSpeed checkpoints alike, and rank 0's states are every rank's.
        runner.message_hub.update_info(_RANDOM, random_state())
        if self._must_wait:
            write_whole(partial, target, lambda: self._save(runner, partial.name, meta))
            self._wait_because(runner, self._must_wait, _REASONS[self._must_wait])
            is_written = True
        else:
            is_written = not self._write_behind(runner, partial, target, stale, meta)
        if is_written and is_main_process():
            self._note(runner.work_dir, target, stale, time.perf_counter() - begun)
        self.saved_iteration = step

    def _write_behind(self, runner: Any, partial: Path, target: Path, stale: list[int], meta: dict[str, Any]) -> bool:
        """Copy what the checkpoint holds, and let it be written while training goes on. False: memory is short, it is written already."""
        begun = time.perf_counter()
        self.wait()
        files = self._capture(runner, partial, meta)
        if not files and isinstance(self._ranks, Alone):  # rank 0 writes
            return True
        taken = snapshot.take(files, reusable_bytes=self._reusable_bytes, gather=self._ranks.gather)
        if not taken.is_copy:
            gib = [f"{(size or 0) / 2**30:.1f} GiB" for size in (taken.need_bytes, taken.available_bytes)]
            self._wait_because(runner, "memory", f"a copy takes {gib[0]} of memory, {gib[1]} are free")
            write_together(self._ranks, partial, target, taken.write)
            return False
        self._reusable_bytes = taken.own_bytes if taken.copied is not None else 0
        work_dir, waited_seconds = runner.work_dir, time.perf_counter() - begun

        def write() -> None:
            write_together(self._ranks, partial, target, taken.write)
            if self._ranks.is_first:
                self._note(work_dir, target, stale, waited_seconds, is_behind=True)

        self._writing = self._pool.submit(write)
        return True

    def _capture(self, runner: Any, partial: Path, meta: dict[str, Any]) -> snapshot.Files:
        def save() -> None:
            self._save(runner, partial.name, meta)

        self._ranks.together(lambda: remove(partial) if is_main_process() else None)
        engine = engine_of(runner)
        if engine is None:
            return snapshot.of_runner(save, partial)
        try:
            return snapshot.of_engine(save, engine)
        except BaseException:
            if is_main_process():
                remove(partial)
            raise

    def _wait_because(self, runner: Any, why: str, reason: str) -> None:
        """Say once why training stands still while it is saved."""
        if self._saving.why != why:
            self._saving.why = why
            runner.logger.info(f"Training waits while checkpoints are written: {reason}.")

    def _note(
        self, work_dir: str, target: Path, stale: list[int], waited_seconds: float, *, is_behind: bool = False
    ) -> None:
        write_text(Path(work_dir) / "last_checkpoint", str(target))
        for old in stale:
            remove(Path(self.out_dir) / self.filename_tmpl.format(old))
        self._saving.add(waited_seconds, is_behind=is_behind)
        write_json(Path(work_dir) / SAVING_FILE, self._saving.to_json())

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
        stale: list[int] = []
        if self.max_keep_ckpts > 0:
            kept = [old for old in self.keep_ckpt_ids if old != step]
            if step not in self._beside:
                kept.append(step)
            stale, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)
            runner.message_hub.update_info("keep_ckpt_ids", list(kept))
        if self._best is None:
            return stale
        unneeded = {*stale, *self._beside}
        self._beside = [self._best] if self._best in unneeded else []
        runner.message_hub.update_info(_BEST, [self._best, *self._beside])
        return sorted(unneeded - {self._best})


def engine_of(runner: Any) -> Any:
    """DeepSpeed's engine that drives this runner; None where none does."""
    return getattr(getattr(runner, "strategy", None), "model", None)


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
