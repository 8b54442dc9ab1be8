"""What the trainer tells the app while it trains, and how it hears a stop: metrics.jsonl, samples.jsonl, stop.request."""

import json
import time
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from torch import distributed

from core.runs.pace import Pace
from core.xtuner.runtime.checkpoint import WholeCheckpointHook
from core.xtuner.runtime.ranks import is_one_machine, new_group

_WINDOW_SECONDS: Final = 45.0
"""How long a stop waits for the end of the accumulation window, whose gradients no checkpoint holds."""


class LiveHook(Hook):  # type: ignore[misc]
    """One line a micro-step in metrics.jsonl: raw values, the loss as mean over ranks.

    The loss of this rank is known already (mmengine reads it for its log). With several ranks, loss and tokens travel in one
    asynchronous all-reduce that is read a step later. On one machine it goes past the GPUs, where it would wait for all that was sent
    to them before.
    """

    # Before sample answers (LOW) and validation, which are no part of the step.
    priority = 65

    def __init__(self, run: str) -> None:
        self._path = Path(run) / "metrics.jsonl"
        self._stream: Any = None
        self._pending: tuple[dict[str, Any], torch.Tensor, Any] | None = None
        self._group: Any = None
        self._device = "cpu"
        self._mark = time.perf_counter()
        self._data_seconds = 0.0
        self.will_stop = False
        """What rank 0 tells the others with its loss: stop after the step in which you hear it."""
        self.must_stop = False
        """Set on every rank in the same step."""

    def before_train(self, runner: Any) -> None:
        del runner
        if get_world_size() > 1:
            # Between machines NCCL finds its way where gloo may not: a host's name often stands for its own loopback.
            by_host = distributed.get_backend() != "gloo" and is_one_machine()
            self._group = new_group() if by_host else distributed.group.WORLD
            self._device = "cpu" if distributed.get_backend(self._group) == "gloo" else "cuda"
        if get_rank() == 0:
            self._stream = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open until after_train

    def mark(self) -> None:
        """The next step begins now: what came before (validation, saving, sample answers) is not counted to it."""
        self._mark = time.perf_counter()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        del runner, batch_idx, data_batch
        self._data_seconds = time.perf_counter() - self._mark

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        del batch_idx, outputs
        hub = runner.message_hub
        line: dict[str, Any] = {
            "iteration": runner.iter + 1,
            "epoch": round((runner.iter + 1) / max(1, len(runner.train_dataloader)), 4),
            "total_iterations": runner.max_iters,
            "loss": hub.get_scalar("train/loss").current(),
            "lr": hub.get_scalar("train/lr").current(),
            "grad_norm": gradient_norm(runner),
            "tokens": count_tokens(data_batch),
            "step_seconds": round(time.perf_counter() - self._mark, 6),
            "data_seconds": round(self._data_seconds, 6),
            "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "at": round(time.time(), 3),
        }
        if get_world_size() == 1:
            self.must_stop = self.will_stop
            self._write(line)
        else:
            self._collect()
            self._send(line)

    def after_train(self, runner: Any) -> None:
        del runner
        self._collect()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _send(self, line: dict[str, Any]) -> None:
        told = [line["loss"], line["tokens"], float(self.will_stop)]
        values = torch.tensor(told, dtype=torch.float64, device=self._device)
        self._pending = (line, values, distributed.all_reduce(values, group=self._group, async_op=True))

    def _collect(self) -> None:
        if self._pending is None:
            return
        line, values, work = self._pending
        self._pending = None
        work.wait()
        loss, tokens, stops = values.tolist()
        self.must_stop = self.must_stop or stops > 0
        self._write(line | {"loss": loss / get_world_size(), "tokens": round(tokens)})

    def _write(self, line: dict[str, Any]) -> None:
        if self._stream is not None:
            # A loss that is no number is written as NaN, as Python's json reads it: it must be seen, not hidden.
            self._stream.write(json.dumps(line) + "\n")


class StopHook(Hook):  # type: ignore[misc]
    """Sees stop.request on rank 0; every rank then saves and ends in the same step, with exit code 0.

    The end of an accumulation window is waited for if it is near, because no checkpoint holds half-gathered gradients.
    On a disk that answers slowly it looks less often than at every step.
    """

    priority = "LOWEST"

    def __init__(self, run: str, accumulation: int = 1, pace: Pace | None = None) -> None:
        # The second is the batch file's, near the time limit of a Slurm job.
        self._files = (Path(run) / "stop.request", Path(run) / "requeue.request")
        self._accumulation = accumulation
        self._seen_at: float | None = None
        self._pace = pace or Pace()

    def before_train(self, runner: Any) -> None:
        """After every other hook's: the first step begins now."""
        find(runner, LiveHook).mark()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Decide before the step, so that its loss carries the word to the other ranks."""
        del batch_idx, data_batch
        if get_rank() != 0:
            return
        self._look()
        if self._seen_at is None:
            return
        # With several ranks the word is read one step after it was sent: send it one step before the window ends.
        heard_at = runner.iter + (1 if get_world_size() == 1 else 2)
        is_whole = heard_at % self._accumulation == 0
        if is_whole or time.monotonic() - self._seen_at > _WINDOW_SECONDS:
            find(runner, LiveHook).will_stop = True

    def _look(self) -> None:
        if self._seen_at is None and self._pace.is_due():
            with self._pace.taken():
                is_asked = any(file.exists() for file in self._files)
            self._seen_at = time.monotonic() if is_asked else None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        del batch_idx, data_batch, outputs
        live = find(runner, LiveHook)
        if live.must_stop:
            runner.logger.info(f"Stop asked for: saving at iteration {runner.iter + 1} and ending.")
            find(runner, WholeCheckpointHook).save_now(runner)
            runner.train_loop.stop_training = True
        live.mark()


def gradient_norm(runner: Any) -> float | None:
    """Norm of the gradient before clipping, on the micro-steps that moved the weights; else None."""
    engine: Any = getattr(runner.optim_wrapper, "model", None)
    if hasattr(engine, "get_global_grad_norm"):
        norm = engine.get_global_grad_norm() if engine.was_step_applied() else None
        return None if norm is None else float(norm)
    if not runner.optim_wrapper.should_update() or "train/grad_norm" not in runner.message_hub.log_scalars:
        return None
    return float(runner.message_hub.get_scalar("train/grad_norm").current())


def count_tokens(data_batch: Any) -> int:
    """Tokens of a batch without padding."""
    data = (data_batch or {}).get("data") or {}
    mask, ids = data.get("attention_mask"), data.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    return 0 if ids is None else int(ids.numel())


def find(runner: Any, kind: type[Any]) -> Any:
    """The run's hook of this class."""
    return next(hook for hook in runner.hooks if isinstance(hook, kind))
