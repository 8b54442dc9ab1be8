"""One pass for several micro-batches, hidden behind the training loop's own steps.

The loop still takes one micro-batch at a time, each with its own loss; schedules, hooks, saving and the optimizer's steps stay where
they were. The first step of a group looks ahead in the loader and computes the whole group; the others hand out their losses.
"""

import gc
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from core.xtuner.runtime.speed.batches import Pass, flatten
from core.xtuner.runtime.speed.reading import LateNorm, Reading


class LookAhead:
    """An iterator that can show what comes next without taking it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._waiting: deque[Any] = deque()

    def __iter__(self) -> "LookAhead":
        return self

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else next(self._source)

    def upcoming(self, count: int) -> list[Any]:
        """The next `count` items, which stay in line. Fewer at the end."""
        while len(self._waiting) < count:
            try:
                self._waiting.append(next(self._source))
            except StopIteration:
                break
        return list(self._waiting)[:count]


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_training_mode(model: Any) -> None:
    """Let `model.train()` do nothing where every module trains already.

    mmengine calls it before each micro-step: a thousand assignments in which the device waits between two passes.
    """
    modules, change = tuple(model.modules()), model.train

    def train(mode: bool = True) -> Any:
        is_there = mode and all(module.training for module in modules)
        return model if is_there else change(mode)

    model.train = train


class GroupedStep(ABC):
    """Stands in for `train_step` of the runner's model. What drives the optimizer differs; taking batches does not."""

    def __init__(
        self, model: Any, optim_wrapper: Any, loader: LookAhead, *, group: int, by_sample: bool, device: torch.device,
        seed: Callable[[], int], tighten: Callable[[], bool],
    ) -> None:  # fmt: skip
        """`tighten` makes passes take less memory; False if they do already."""
        self._model = model
        self._optimizer = optim_wrapper
        self._loader = loader
        self.group = group
        self._by_sample = by_sample
        self._device = device
        self._seed = seed
        self._tighten = tighten
        self._losses: deque[Tensor] = deque()
        self._prepared: tuple[int, Pass] | None = None

    def __call__(self, data: Mapping[str, Any], optim_wrapper: Any) -> dict[str, Tensor]:
        del optim_wrapper  # the run has one
        is_first = not self._losses
        if is_first:
            done = self._position()
            reading = self._group_losses(data, done)
            self._prepare(len(reading), done + len(reading))
            self._losses.extend(reading.value().unbind())
        loss = self._losses.popleft()
        self._end_micro_step(is_first=is_first, is_last=not self._losses)
        return {"loss": loss}

    def _group_losses(self, data: Mapping[str, Any], done: int) -> Reading:
        """Where memory was planned too tightly: with less kept, then with fewer micro-batches, as long as that can help."""
        while True:
            batch = self._take(data, self._size(done))
            try:
                return self._compute(batch)
            except torch.OutOfMemoryError:
                has_less = self._tighten()
                if not self._discard(done) or (batch.micro_batches == 1 and not has_less):
                    raise
                self.group = batch.micro_batches if has_less else batch.micro_batches // 2
            # Out of the except clause, whose traceback held the tensors of the failed pass.
            del batch
            free_memory(self._device)
            print_log(f"speed: out of memory; now {self.group} micro-batches a pass", "current", logging.WARNING)

    def _discard(self, done: int) -> bool:
        """Throw away the gradients of a failed pass; False where they cannot be told from good ones."""
        del done
        return False

    @abstractmethod
    def _position(self) -> int:
        """Micro-steps done so far."""

    @abstractmethod
    def _size(self, done: int) -> int:
        """Micro-batches of the group that begins after `done` micro-steps: never across a step of the optimizer."""

    @abstractmethod
    def _compute(self, batch: Pass) -> Reading:
        """Forward and backward pass of a group; the loss of each of its micro-batches.

        It is read between the two: the host goes through the group's other steps while the device makes the gradients.
        """

    @abstractmethod
    def _end_micro_step(self, *, is_first: bool, is_last: bool) -> None:
        """Count one micro-step and move the weights where a window ends. is_first, is_last: of its group."""

    def _take(self, data: Mapping[str, Any], count: int) -> Pass:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == id(data):
            return prepared[1]
        rest = self._loader.upcoming(max(0, count - 1))
        return flatten([item["data"] for item in (data, *rest)], self._device, by_sample=self._by_sample)

    def _prepare(self, count: int, done: int) -> None:
        """Collate the group that follows this one of `count`, and send it, while the device computes what it was told; once.

        done: micro-steps when the next one begins.
        """
        if self._prepared is not None:
            return
        waiting, size = count - 1, self._size(done)
        items = self._loader.upcoming(waiting + size)[waiting:] if size > 0 else []
        if len(items) == size and items:
            batch = flatten([item["data"] for item in items], self._device, by_sample=self._by_sample)
            self._prepared = (id(items[0]), batch)


class PlainStep(GroupedStep):
    """With mmengine's OptimWrapper, with or without DDP and AMP."""

    def __init__(self, model: Any, optim_wrapper: Any, loader: LookAhead, **options: Any) -> None:
        super().__init__(model, optim_wrapper, loader, **options)
        self._norm = LateNorm(optim_wrapper)

    def _position(self) -> int:
        return int(self._optimizer._inner_count)

    def _size(self, done: int) -> int:
        accumulation = int(self._optimizer._accumulative_counts)
        size = min(self.group, accumulation - done % accumulation)
        limit = int(self._optimizer._max_counts)
        return min(size, limit - done) if limit > 0 else size

    def _compute(self, batch: Pass) -> Reading:
        done = self._position() + batch.micro_batches
        must_sync = done % self._optimizer._accumulative_counts == 0 or done == self._optimizer._max_counts
        is_silent = not must_sync and hasattr(self._model, "no_sync")
        with self._model.no_sync() if is_silent else nullcontext():
            losses: Tensor = self._model(batch, self._seed(), mode="loss")["loss"]
            reading = Reading(losses)
            self._optimizer.backward(self._optimizer.scale_loss(losses.sum()))
        return reading

    def _end_micro_step(self, *, is_first: bool, is_last: bool) -> None:
        del is_last
        if not is_first:  # backward() has counted the first
            self._optimizer._inner_count += 1
        if self._optimizer.should_update():
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._norm.settle()

    def _discard(self, done: int) -> bool:
        # In the middle of a window the gradients gathered before would be lost too; DDP may have sent a part of them.
        is_alone = done % int(self._optimizer._accumulative_counts) == 0 and not hasattr(self._model, "no_sync")
        if is_alone:
            self._optimizer.zero_grad()
        return is_alone


class EngineStep(GroupedStep):
    """With DeepSpeed's engine, which counts micro-steps itself and reduces gradients in the last one of a window.

    The count is set to the group's last micro-step before its backward pass; the engine's step is taken when the loop gets there.
    """

    # `_model` is the engine itself; mmengine's wrapper around it would keep a changed count to itself.

    def _position(self) -> int:
        return int(self._model.micro_steps)

    def _size(self, done: int) -> int:
        accumulation = int(self._model.gradient_accumulation_steps())
        return min(self.group, accumulation - done % accumulation)

    def _compute(self, batch: Pass) -> Reading:
        losses: Tensor = self._model(batch, self._seed(), mode="loss")["loss"]
        reading = Reading(losses)
        # Now: the engine waits for the gradients at the end of the backward pass.
        self._prepare(batch.micro_batches, self._position() + batch.micro_batches)
        self._model.micro_steps += batch.micro_batches - 1
        self._model.backward(losses.sum())
        return reading

    def _end_micro_step(self, *, is_first: bool, is_last: bool) -> None:
        del is_first
        if is_last:
            self._model.step()
        else:
            # Else the engine would still say that the step before moved the weights.
            self._model._step_applied = False
