"""Checkpoints are written behind the training: what they hold is what was, they appear whole, and what fails is heard."""

import errno
import io
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


class Logger:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str) -> None:
        self.lines.append(line)


class Runner:
    """As much of mmengine's as the hook asks for."""

    def __init__(self, work_dir: Path) -> None:
        import torch

        self.work_dir = str(work_dir)
        self.logger = Logger()
        self.message_hub = Hub()
        self.weight = torch.zeros(3)
        self.history = [1.0]

    def save_checkpoint(self, out_dir: str, name: str, *_arguments: Any, **_options: Any) -> None:
        from mmengine.runner import runner as room

        held = {"state_dict": {"weight": self.weight}, "message_hub": {"history": self.history}}
        room.save_checkpoint(held, str(Path(out_dir) / name))


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.xtuner.runtime import snapshot

    monkeypatch.setattr(snapshot, "memory", lambda: {"available_bytes": 2**40})


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
        assert may_write.wait(600)
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
    """A file that takes 64 bytes and no more, through torch's own writer, which then complains of its position instead."""
    from core.xtuner.runtime import failures, snapshot

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 64:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    runner = Runner(tmp_path)
    save(hook, runner, 1)
    hook.wait()
    monkeypatch.setattr(snapshot, "open", Full, raising=False)
    save(hook, runner, 2)
    writing = hook._writing
    with pytest.raises(OSError, match="No space"):
        writing.result(600)
    with pytest.raises(OSError, match="No space") as heard:
        hook.after_train_iter(runner, 1)
    explained = failures.explain(heard.value)
    assert explained is not None
    assert explained.code == "train.disk_full"
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_1.pth"], "the last whole one is still there"
    assert (tmp_path / "last_checkpoint").read_text().endswith("iter_1.pth")
    assert not list(tmp_path.glob(".*"))


def test_where_memory_is_short_training_waits_and_says_so_once(
    hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.runs.saving import read_saving
    from core.xtuner.runtime import snapshot

    runner = Runner(tmp_path)
    save(hook, runner, 1)
    hook.wait()
    monkeypatch.setattr(snapshot, "memory", lambda: {"available_bytes": 2**30})
    for step in (2, 3):
        save(hook, runner, step)
        assert hook._writing is None
        assert [path.name for path in tmp_path.glob("*.pth")] == [f"iter_{step}.pth"]
    assert runner.logger.lines == [
        "Training waits while checkpoints are written: a copy takes 0.0 GiB of memory, 1.0 GiB are free."
    ]
    saving = read_saving(tmp_path)
    assert saving is not None
    assert (saving.count, saving.behind, saving.why) == (3, 1, "memory")


def test_steps_go_on_while_a_real_runner_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the checkpoint of the third step cannot be written before the fifth step is done."""
    import torch
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner as RealRunner

    from core.xtuner.runtime.checkpoint import WholeCheckpointHook

    class Tiny(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, inputs: Any, mode: str = "loss") -> Any:
            del mode
            return {"loss": (self.weight * inputs).square().sum()}

    fifth_is_done, write, seen = threading.Event(), torch.save, list[int]()

    class Watch(Hook):  # type: ignore[misc]
        priority = "LOWEST"

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            del batch_idx, data_batch, outputs
            if runner.iter == 2:
                seen.extend(runner.model.weight.detach().tolist())
            if runner.iter == 4:
                assert not [*tmp_path.glob("*.pth"), *tmp_path.glob("last_checkpoint")]
                fifth_is_done.set()

    def late(*arguments: Any, **options: Any) -> None:
        assert fifth_is_done.wait(600)
        write(*arguments, **options)

    monkeypatch.setattr(torch, "save", late)
    runner = RealRunner(
        Tiny(),
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader([{"inputs": torch.ones(4)}] * 6, batch_size=1),
        train_cfg={"by_epoch": False, "max_iters": 6},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}},
        default_hooks={"checkpoint": {"type": WholeCheckpointHook, "by_epoch": False, "interval": 3}, "logger": None},
        custom_hooks=[{"type": Watch}],
        visualizer={"type": "Visualizer", "vis_backends": None},
        log_level="ERROR",
        default_scope="mmengine",
        experiment_name="steps",
    )
    runner.train()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_3.pth", "iter_6.pth"]
    held = torch.load(tmp_path / "iter_3.pth", weights_only=False)
    assert held["state_dict"]["weight"].tolist() == seen, "the weights of its own step, not of a later one"
    assert held["optimizer"]["state"][0]["step"] == 3
    assert (tmp_path / "last_checkpoint").read_text().endswith("iter_6.pth")


def test_saves_wait_for_one_another(hook: Any, tmp_path: Path) -> None:
    import torch

    runner = Runner(tmp_path)
    for step in range(1, 6):
        runner.weight += 1
        save(hook, runner, step)
    hook.wait()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_5.pth"]
    assert torch.load(tmp_path / "iter_5.pth", weights_only=True)["state_dict"]["weight"].tolist() == [5, 5, 5]


def test_tied_weights_are_copied_and_written_once(tmp_path: Path) -> None:
    import torch

    from core.xtuner.runtime import snapshot

    weight = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    content = {"model": {"embedding": weight, "head": weight.detach()}, "steps": [torch.tensor(3)], "name": "x"}
    taken = snapshot.take({tmp_path / "one.pth": content}, gather=lambda word: [word])
    assert (taken.is_copy, taken.need_bytes) == (True, 6 * 4 + 8)
    with torch.no_grad():
        weight.zero_()
    content["steps"].append(4)
    taken.write()
    held = torch.load(tmp_path / "one.pth", weights_only=True)
    assert held["model"]["head"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert held["model"]["head"].data_ptr() == held["model"]["embedding"].data_ptr()
    assert (held["steps"], held["name"]) == ([torch.tensor(3)], "x")
