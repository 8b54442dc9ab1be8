"""Hooks that a test puts into a real training to look at its saving: DeepSpeed's own beside ours, and two machines that are one."""

import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from mmengine.hooks import Hook

from core.xtuner.runtime.checkpoint import WholeCheckpointHook
from core.xtuner.runtime.hooks import find

OWN: Final = "as_deepspeed_saves"


class SaveTwice(Hook):  # type: ignore[misc]
    """After iteration `after`, when ours has begun to write, DeepSpeed saves the same by itself into `OWN`."""

    # After the checkpoint hook's.
    priority = "LOWEST"

    def __init__(self, after: int) -> None:
        self._after = after

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        del batch_idx, data_batch, outputs
        if runner.iter + 1 == self._after:
            find(runner, WholeCheckpointHook)._save(runner, OWN, {})


class ManyMachines(Hook):  # type: ignore[misc]
    """Lets every rank take itself for the only one of its machine."""

    def before_run(self, runner: Any) -> None:
        del runner
        os.environ["LOCAL_WORLD_SIZE"] = "1"


def assert_same(one: Path, other: Path) -> None:
    """Two checkpoints of DeepSpeed hold the same, number by number; only the clock may differ."""
    import torch

    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert len([name for name in names if name.endswith("optim_states.pt")]) == 2
    for name in names:
        if name.endswith(".pt"):
            pair = [torch.load(folder / name, map_location="cpu", weights_only=False) for folder in (one, other)]
            _assert_equal(*pair, name)
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes()


def _assert_equal(one: Any, other: Any, where: str) -> None:
    import torch

    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        assert np.array_equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            if not where.endswith("/meta") or key != "time":
                _assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            _assert_equal(left, right, f"{where}/{number}")
    elif hasattr(one, "__dict__") and type(one).__eq__ is object.__eq__:
        _assert_equal(vars(one), vars(other), where)
    else:
        assert one == other, where
