"""Validation loss while it trains: the config's block `validation`, computed on held-out rows by all ranks, into validation.jsonl.

Decides from it which checkpoint is the best and when training ends early. The loss is the mean over all predicted tokens, so
neither the batch size nor the number of ranks changes it. Training is left as it was: no gradient, no random number drawn.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from torch import Tensor, distributed

from core.errors import InputError
from core.xtuner.runtime.checkpoint import WholeCheckpointHook
from core.xtuner.runtime.hooks import LiveHook, find
from core.xtuner.runtime.speed.batches import IGNORED, flatten
from core.xtuner.runtime.speed.step import GroupedStep

_STATE: Final = "danlu_validation"
"""In mmengine's message hub, which every checkpoint holds: a resumed run goes on counting where it was."""


@dataclass(slots=True)
class Verdict:
    """What the validations so far amount to."""

    seen: int | None = None
    """Iteration of the last one."""
    best_loss: float | None = None
    best_iteration: int = 0
    mark: float | None = None
    """The loss that must be undercut by the least improvement."""
    waited: int = 0
    """Validations in a row that did not."""

    def see(self, loss: float, iteration: int, min_delta: float) -> bool:
        """Whether this loss is the lowest so far. One that is no number never is, and is no improvement."""
        self.seen, is_number = iteration, math.isfinite(loss)
        if is_number and (self.mark is None or loss < self.mark - min_delta):
            self.mark, self.waited = loss, 0
        else:
            self.waited += 1
        is_best = is_number and (self.best_loss is None or loss < self.best_loss)
        if is_best:
            self.best_loss, self.best_iteration = loss, iteration
        return is_best


class ValidationHook(Hook):  # type: ignore[misc]
    """Validates before the first step, every `every_n_iters` micro-steps and at the end; not while a stop is asked for."""

    # After LiveHook, which ends the step's time; before checkpoints are saved, which hold what was found here.
    priority = 80

    def __init__(self, run: str, dataset: Any, every_n_iters: int, **options: Any) -> None:
        """Options: `patience` 0 (never ends early), `min_delta` 0.0, `save_best` True, `batch_size` 1, of each rank."""
        self._path = Path(run) / "validation.jsonl"
        self._config, self._batch_size = dataset, int(options.get("batch_size", 1))
        self._every, self._patience = every_n_iters, int(options.get("patience", 0))
        self._min_delta, self._saves_best = float(options.get("min_delta", 0.0)), bool(options.get("save_best", True))
        self._verdict = Verdict()
        self._batches: list[Batch] = []

    def before_train(self, runner: Any) -> None:
        self._batches = share(rows_of(self._config), self._batch_size, get_rank(), get_world_size())
        if _STATE in runner.message_hub.runtime_info:
            self._verdict = Verdict(**runner.message_hub.get_info(_STATE))
            if self._patience and self._verdict.waited >= self._patience:
                self._verdict.waited = 0  # It had ended early; whoever goes on wants to see more.
        # Before the first step, and what a stop left out: it does not wait for a validation.
        is_owed = self._verdict.seen is None or (runner.iter % self._every == 0 and self._verdict.seen != runner.iter)
        if is_owed:
            self._validate(runner, runner.iter, may_end=False)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        del batch_idx, data_batch, outputs
        is_last = self.is_last_train_iter(runner)
        is_due = self.every_n_train_iters(runner, self._every) or is_last
        if not is_due or find(runner, LiveHook).must_stop:
            return
        if self._validate(runner, runner.iter + 1, may_end=not is_last):
            runner.logger.info(f"No better validation loss in {self._patience} validations: saving and ending.")
            find(runner, WholeCheckpointHook).save_now(runner)
            runner.train_loop.stop_training = True

    def _validate(self, runner: Any, iteration: int, *, may_end: bool) -> bool:
        """Compute the loss, remember and write what it means; whether training should end."""
        self._write({"iteration": iteration, "begun_at": round(time.time(), 3)})
        began = time.perf_counter()
        loss, tokens = mean_loss(runner, self._batches)
        is_best = self._verdict.see(loss, iteration, self._min_delta)
        runner.message_hub.update_info(_STATE, asdict(self._verdict))
        if is_best and self._saves_best and iteration:
            find(runner, WholeCheckpointHook).mark_best(runner, iteration)
        ends = may_end and bool(self._patience) and self._verdict.waited >= self._patience
        runner.logger.info(f"Validation loss at iteration {iteration}: {loss:.5f}")
        runner.visualizer.add_scalar("validation/loss", loss, step=iteration)
        self._write(
            {
                "iteration": iteration,
                "loss": loss,
                "tokens": tokens,
                "seconds": round(time.perf_counter() - began, 3),
                "is_best": is_best,
                "waited": self._verdict.waited,
                "patience": self._patience,
                "ends": ends,
                "at": round(time.time(), 3),
            }
        )
        return ends

    def _write(self, line: dict[str, Any]) -> None:
        if get_rank() == 0:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one forward pass."""

    rows: tuple[dict[str, Any], ...]
    predicted: int
    """Labels among them, each predicted by the token before it; 0 for a pass that only keeps the others company."""

    def collated(self) -> dict[str, Any]:
        """As XTuner collates training rows, padded at the right."""
        from xtuner.dataset.collate_fns import default_collate_fn

        collated: dict[str, Any] = default_collate_fn(self.rows)
        return collated


def rows_of(config: Any) -> Any:
    """The tokenised rows, one a text. Raises InputError `train.no_validation_rows` if none is left to predict."""
    from xtuner.registry import BUILDER

    rows = BUILDER.build(config)
    if not len(rows):
        raise InputError("train.no_validation_rows")
    return rows


def share(rows: Any, batch_size: int, rank: int, ranks: int) -> list[Batch]:
    """This rank's batches, the longest rows first. Every rank gets as many: with ZeRO-3 each pass gathers weights from all."""
    lengths = rows["length"]
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    chosen = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = [_batch(rows, numbers) for numbers in chosen[rank::ranks]]
    missing = -(-len(chosen) // ranks) - len(mine)
    return mine + [Batch(_batch(rows, chosen[-1]).rows, 0)] * missing


def _batch(rows: Any, numbers: list[int]) -> Batch:
    picked = tuple({name: rows[number][name] for name in ("input_ids", "labels")} for number in numbers)
    return Batch(picked, sum(label != IGNORED for row in picked for label in row["labels"][1:]))


def mean_loss(runner: Any, batches: list[Batch]) -> tuple[float, int]:
    """Mean loss over the predicted tokens of all ranks, and how many they are. The model is left in training mode."""
    model = runner.model
    model.eval()
    try:
        with torch.no_grad():
            sums = torch.tensor([0.0, 0.0], dtype=torch.float64)
            for losses, predicted in zip(_losses(runner, batches), (batch.predicted for batch in batches), strict=True):
                if predicted:
                    sums += torch.tensor([float(losses) * predicted, predicted], dtype=torch.float64)
    finally:
        model.train()
    if distributed.is_initialized() and get_world_size() > 1:
        sums = sums.to("cuda" if torch.cuda.is_available() else "cpu")
        distributed.all_reduce(sums)
        distributed.broadcast(sums, 0)  # What follows is decided on every rank: from the very same number.
    total, tokens = sums.tolist()
    return total / max(1.0, tokens), round(tokens)


def _losses(runner: Any, batches: list[Batch]) -> Iterator[Tensor]:
    loss_of = _forward(runner)
    for batch in batches:
        yield loss_of(batch.collated())


def _forward(runner: Any) -> Callable[[dict[str, Any]], Tensor]:
    """Collated batch → mean loss, by the pass that trains: the speed layer's, whose logits never exist all at once, or the stock one.

    Without DeepSpeed the wrapped model itself: DistributedDataParallel would exchange buffers at each pass.
    """
    wrapper = runner.optim_wrapper
    engine = wrapper.model.model if hasattr(wrapper, "model") else None
    held = runner.model if engine is None else engine
    module = held.module if hasattr(held, "module") else held
    forward = module if engine is None else engine
    if isinstance(vars(runner.model).get("train_step"), GroupedStep):
        device = next(module.parameters()).device
        return lambda batch: forward(flatten([batch["data"]], device, by_sample=False), 1, mode="loss")["loss"].sum()

    def stock(batch: dict[str, Any]) -> Tensor:
        data = module.data_preprocessor(batch, False)
        with wrapper.optim_context(module) if engine is None else nullcontext():
            loss: Tensor = forward(**data, mode="loss")["loss"]
        return loss

    return stock
