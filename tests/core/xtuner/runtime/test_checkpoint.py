"""Checkpoints are written behind the training: what they hold is what was, they appear whole, and what fails is heard."""

import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


class Hub:
    def __init__(self) -> None:
        self.runtime_info: dict[str, Any] = {}

    def update_info(self, key: str, value: Any) -> None:
        self.runtime_info[key] = value


class Runner:
    """As much of mmengine's as the hook asks for; the name says that no engine drives it."""

    def __init__(self, work_dir: Path) -> None:
        import torch

        self.work_dir = str(work_dir)
        self.message_hub = Hub()
        self.weight = torch.zeros(3)
        self.history = [1.0]

    def save_checkpoint(self, out_dir: str, name: str, *_arguments: Any, **_options: Any) -> None:
        from mmengine.runner import runner as room

        held = {"state_dict": {"weight": self.weight}, "message_hub": {"history": self.history}}
        room.save_checkpoint(held, str(Path(out_dir) / name))


@pytest.fixture
def hook(tmp_path: Path) -> Any:
    from core.xtuner.runtime.checkpoint import WholeCheckpointHook

    made = WholeCheckpointHook(by_epoch=False, interval=1, max_keep_ckpts=1)
    made.out_dir, made.filename_tmpl = str(tmp_path), "iter_{}.pth"
    made.keep_ckpt_ids = deque()
    return made


def save(hook: Any, runner: Runner, step: int) -> None:
    hook._save_checkpoint_with_step(runner, step, meta={"iter": step})


def test_training_goes_on_while_it_is_written(hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    runner, may_write, write = Runner(tmp_path), threading.Event(), torch.save
    save(hook, runner, 1)
    hook.wait()

    def slowly(*arguments: Any, **options: Any) -> None:
        assert may_write.wait(20)
        write(*arguments, **options)

    monkeypatch.setattr(torch, "save", slowly)
    save(hook, runner, 2)
    runner.weight += 7
    runner.history.append(2.0)
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_1.pth"], (
        "the old one stays until the new one is whole"
    )
    may_write.set()
    hook.after_train(runner)
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_2.pth"]
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_2.pth")
    held = torch.load(tmp_path / "iter_2.pth", weights_only=True)
    assert held["state_dict"]["weight"].tolist() == [0, 0, 0], "what it was when it was saved"
    assert held["message_hub"]["history"] == [1.0]


def test_a_full_disk_is_heard_at_the_next_step(hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    runner = Runner(tmp_path)
    save(hook, runner, 1)
    hook.wait()
    monkeypatch.setattr(torch, "save", full)
    save(hook, runner, 2)
    writing = hook._writing
    with pytest.raises(OSError, match="No space"):
        writing.result(20)
    with pytest.raises(OSError, match="No space"):
        hook.after_train_iter(runner, 1)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_1.pth"], "the last whole one is still there"
    assert not list(tmp_path.glob(".*"))


def test_saves_wait_for_one_another(hook: Any, tmp_path: Path) -> None:
    import torch

    runner = Runner(tmp_path)
    for step in range(1, 6):
        runner.weight += 1
        save(hook, runner, step)
    hook.wait()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_5.pth"]
    assert torch.load(tmp_path / "iter_5.pth", weights_only=True)["state_dict"]["weight"].tolist() == [5, 5, 5]
