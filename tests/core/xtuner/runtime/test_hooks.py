"""What the hooks of a training ask the disk for. Time here is counted, not waited for."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from core.runs.pace import Pace
from core.xtuner.runtime import hooks
from core.xtuner.runtime.hooks import LiveHook, StopHook
from tests.slow_disk import Clock, SlowDisk

STEP_SECONDS, DISK_SECONDS = 0.1, 0.05


def test_looking_for_a_stop_takes_a_small_part_of_the_time(tmp_path: Path) -> None:
    clock = Clock()
    hook = StopHook(str(tmp_path), pace=Pace(now=clock))
    with SlowDisk(tmp_path, DISK_SECONDS, clock.sleep) as disk:
        for _ in range(1000):
            clock.sleep(STEP_SECONDS)
            hook.before_train_iter(None, 0)
    assert 0 < disk.count * DISK_SECONDS < 0.03 * clock.seconds


def test_where_the_disk_answers_at_once_every_step_looks_and_the_first_after_the_click_hears(tmp_path: Path) -> None:
    hook, live = StopHook(str(tmp_path), accumulation=2, pace=Pace(now=Clock())), LiveHook(str(tmp_path))
    runner = SimpleNamespace(iter=0, hooks=[hook, live])
    with SlowDisk(tmp_path) as disk:
        for runner.iter in range(10):
            hook.before_train_iter(runner, runner.iter)
    assert disk.count == 2 * 10
    (tmp_path / "stop.request").touch()
    hook.before_train_iter(runner, runner.iter + 1)
    assert live.will_stop, "iteration 10 ends a window"


@pytest.mark.parametrize(
    ("backend", "is_one_machine", "group", "device"),
    [("nccl", True, "host", "cpu"), ("nccl", False, "world", "cuda"), ("gloo", True, "world", "cpu")],
)
def test_losses_go_past_the_gpus_only_where_all_ranks_are_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, is_one_machine: bool, group: str, device: str
) -> None:
    world = SimpleNamespace(
        group=SimpleNamespace(WORLD="world"),
        get_backend=lambda asked=None: "gloo" if asked == "host" else backend,
    )
    monkeypatch.setattr(hooks, "distributed", world)
    monkeypatch.setattr(hooks, "get_world_size", lambda: 2)
    monkeypatch.setattr(hooks, "get_rank", lambda: 1)
    monkeypatch.setattr(hooks, "is_one_machine", lambda: is_one_machine)
    monkeypatch.setattr(hooks, "new_group", lambda: "host")
    live = LiveHook(str(tmp_path))
    live.before_train(None)
    assert (live._group, live._device) == (group, device)
