"""Groups of micro-batches behind single steps: never across a step of the optimizer, and repeated smaller when memory is short."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.core.xtuner.runtime.speed.conftest import packed_batch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


class Toy:
    """Counts the micro-batches of each pass; its loss is weight · (mean token of the micro-batch)."""

    def __init__(self, *, most: int = 10**9) -> None:
        import torch

        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.passes: list[int] = []
        self.most = most

    def __call__(self, batch: Any, seed: int, mode: str) -> dict[str, Any]:
        import torch

        assert (seed, mode) == (4, "loss")
        if batch.micro_batches > self.most:
            (self.weight * 1e6).backward()  # what a pass that dies half-way leaves
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.passes.append(batch.micro_batches)
        counts = torch.zeros(batch.micro_batches).index_add_(0, batch.owners, batch.targets.float() * batch.shares)
        return {"loss": self.weight * counts / 100}


def train(
    toy: Toy, *, group: int, accumulation: int, steps: int, limit: int = 0, tighten: Any = lambda: False, **options: Any
) -> tuple[list[float], list[float]]:
    """Losses of each micro-step and the weight after it; every step is taken by mmengine's own OptimWrapper."""
    import torch
    from mmengine.optim import OptimWrapper

    from core.xtuner.runtime.speed.step import LookAhead, PlainStep

    def batches() -> Iterator[Any]:
        for number in range(10**6):
            yield {"data": packed_batch([6], seed=number)}

    wrapper = OptimWrapper(torch.optim.SGD([toy.weight], lr=0.01), accumulative_counts=accumulation, **options)
    if limit:
        wrapper.initialize_count_status(torch.nn.Linear(1, 1), 0, limit)
    loader = LookAhead(batches())
    step = PlainStep(
        toy, wrapper, loader, group=group, by_sample=True, device=torch.device("cpu"), seed=lambda: 4, tighten=tighten
    )
    losses, weights = [], []
    for _ in range(steps):
        losses.append(float(step(next(loader), wrapper)["loss"]))
        weights.append(float(toy.weight))
    return losses, weights


def test_look_ahead_takes_nothing_away() -> None:
    from core.xtuner.runtime.speed.step import LookAhead

    loader = LookAhead(iter(range(5)))
    assert loader.upcoming(2) == [0, 1]
    assert next(loader) == 0
    assert loader.upcoming(3) == [1, 2, 3]
    assert list(loader) == [1, 2, 3, 4]
    assert loader.upcoming(3) == []


@pytest.mark.parametrize(("group", "accumulation"), [(2, 4), (4, 4), (8, 4), (3, 4), (4, 1)])
def test_groups_train_as_single_steps_do(group: int, accumulation: int) -> None:
    single, grouped = Toy(), Toy()
    wanted = train(single, group=1, accumulation=accumulation, steps=12)
    found = train(grouped, group=group, accumulation=accumulation, steps=12)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    assert max(grouped.passes) == min(group, accumulation)
    assert sum(grouped.passes) >= 12


def test_the_last_window_may_be_short() -> None:
    """Ten micro-steps, four a window: mmengine moves the weights after the tenth, with the right factor."""
    single, grouped = Toy(), Toy()
    wanted = train(single, group=1, accumulation=4, steps=10, limit=10)
    found = train(grouped, group=4, accumulation=4, steps=10, limit=10)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    assert found[1][9] != found[1][8]
    assert grouped.passes == [4, 4, 2]


def test_too_little_memory_makes_passes_smaller() -> None:
    single, short = Toy(), Toy(most=2)
    asked = []
    wanted = train(single, group=1, accumulation=8, steps=16)
    found = train(short, group=8, accumulation=8, steps=16, tighten=lambda: bool(asked.append(1)) or len(asked) == 1)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5), "what the failed passes left is thrown away"
    assert set(short.passes) == {2}
    assert len(asked) == 3, "first with less kept, then halved twice"


def test_too_little_memory_for_one_micro_batch_ends_the_run() -> None:
    import torch

    with pytest.raises(torch.OutOfMemoryError):
        train(Toy(most=0), group=4, accumulation=4, steps=1)


def test_the_norm_that_is_read_late_is_that_of_the_whole_window_before_clipping() -> None:
    from mmengine.logging import MessageHub

    toy, free = Toy(), Toy()
    _, unclipped = train(free, group=2, accumulation=4, steps=4)
    _, clipped = train(toy, group=2, accumulation=4, steps=4, clip_grad={"max_norm": 0.01, "norm_type": 2})
    norm = (0.5 - unclipped[-1]) / 0.01  # one step of SGD
    assert norm > 0.01
    assert MessageHub.get_current_instance().get_scalar("train/grad_norm").current() == pytest.approx(norm, rel=1e-5)
    assert 0.5 - clipped[-1] == pytest.approx(0.01 * 0.01, rel=1e-3)


def test_clipping_by_value_has_no_norm_to_read() -> None:
    _, weights = train(Toy(), group=2, accumulation=2, steps=2, clip_grad={"type": "value", "clip_value": 0.02})
    assert 0.5 - weights[-1] == pytest.approx(0.01 * 0.02, rel=1e-3)


def test_training_mode_is_set_only_where_it_is_not_there() -> None:
    from torch import nn

    from core.xtuner.runtime.speed.step import keep_training_mode

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.1)))
    asked = list[bool]()

    class Counting(nn.Module):
        def train(self, mode: bool = True) -> nn.Module:
            asked.append(mode)
            return super().train(mode)

    model.append(Counting())
    keep_training_mode(model)
    assert model.train() is model
    assert asked == []
    model[1][0].eval()
    model.train()
    assert asked == [True]
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
