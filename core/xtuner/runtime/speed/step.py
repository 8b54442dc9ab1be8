"""One pass for several micro-batches, hidden behind the training loop's own steps.

The loop still takes one micro-batch at a time, each with its own loss; schedules, hooks, saving and the optimizer's steps stay where
they were. The first step of a group looks ahead in the loader and computes the whole group; the others hand out their losses.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from core.xtuner.runtime.speed.batches import Pass, flatten


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


class GroupedStep:
    """Stands in for `train_step` of the runner's model (mmengine's OptimWrapper, with or without DDP and AMP)."""

    def __init__(
        self, model: Any, loader: LookAhead, *, group: int, by_sample: bool, device: torch.device,
        iteration: Callable[[], int], seed: Callable[[int], int],
    ) -> None:  # fmt: skip
        self._model = model
        self._loader = loader
        self._group = group
        self._by_sample = by_sample
        self._device = device
        self._iteration = iteration
        self._seed = seed
        self._losses: deque[Tensor] = deque()
        self._prepared: tuple[int, Pass] | None = None

    def __call__(self, data: Mapping[str, Any], optim_wrapper: Any) -> dict[str, Tensor]:
        if self._losses:
            optim_wrapper._inner_count += 1
        else:
            self._compute(data, optim_wrapper)
        if optim_wrapper.should_update():
            optim_wrapper.step()
            optim_wrapper.zero_grad()
        return {"loss": self._losses.popleft()}

    def _compute(self, data: Mapping[str, Any], optim_wrapper: Any) -> None:
        count = self._size(optim_wrapper, optim_wrapper.inner_count)
        batch = self._take(data, count)
        done = optim_wrapper.inner_count + batch.micro_batches
        must_sync = done % optim_wrapper._accumulative_counts == 0 or done == optim_wrapper._max_counts
        silent = not must_sync and hasattr(self._model, "no_sync")
        with self._model.no_sync() if silent else nullcontext():
            losses = self._model(batch, self._seed(self._iteration()), mode="loss")["loss"]
            # backward() counts one micro-step; the rest of the group is counted as the loop reaches it.
            optim_wrapper.backward(optim_wrapper.scale_loss(losses.sum()))
        self._losses.extend(losses.detach().unbind())
        self._prepare(batch.micro_batches - 1, self._size(optim_wrapper, done))

    def _size(self, optim_wrapper: Any, inner_count: int) -> int:
        """Micro-batches of the group that begins at `inner_count`: never across a step of the optimizer."""
        accumulation = optim_wrapper._accumulative_counts
        size = min(self._group, accumulation - inner_count % accumulation)
        left = optim_wrapper._max_counts - inner_count
        return max(1, min(size, left)) if optim_wrapper._max_counts > 0 else size

    def _take(self, data: Mapping[str, Any], count: int) -> Pass:
        if self._prepared is not None and self._prepared[0] == id(data):
            batch = self._prepared[1]
            self._prepared = None
            return batch
        rest = self._loader.upcoming(count - 1)
        return flatten([item["data"] for item in (data, *rest)], self._device, by_sample=self._by_sample)

    def _prepare(self, waiting: int, size: int) -> None:
        """Collate the next group and send it to the device while this one is being computed."""
        items = self._loader.upcoming(waiting + size)[waiting:] if size > 0 else []
        if len(items) == size and items:
            batch = flatten([item["data"] for item in items], self._device, by_sample=self._by_sample)
            self._prepared = (id(items[0]), batch)
