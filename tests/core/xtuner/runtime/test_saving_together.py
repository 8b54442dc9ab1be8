"""Two ranks of DeepSpeed write one checkpoint behind the training. Each is a thread with a hook of its own; gloo is real."""

import errno
import io
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.files import read_json
from core.i18n import catalog
from tests.core.xtuner.runtime.test_checkpoint import Hub, Logger

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
_NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt")
"""Which file each rank writes."""


class Process(threading.local):
    """Which rank the code of a thread takes itself for."""

    rank = 0


class Runner:
    """As much of a rank's as the hook asks for. Its engine makes the folder, as DeepSpeed's does."""

    def __init__(self, work_dir: Path, rank: int) -> None:
        import torch

        self.work_dir, self.iter = str(work_dir), 0
        self.logger, self.message_hub = Logger(), Hub()
        self.weight = torch.zeros(3) + rank
        self._rank = rank
        self._writer = SimpleNamespace(save=None)
        self.strategy = SimpleNamespace(model=SimpleNamespace(checkpoint_engine=self._writer))

    def save_checkpoint(self, out_dir: str, name: str, *_arguments: Any, **_options: Any) -> None:
        folder = Path(out_dir) / name
        folder.mkdir(exist_ok=True)
        self._writer.save({"weight": self.weight}, str(folder / _NAMES[self._rank]))


class Pair:
    """Both ranks, in step."""

    def __init__(self, folder: Path, ranks: list[Any], process: Process) -> None:
        from core.xtuner.runtime.checkpoint import WholeCheckpointHook

        self._process = process
        self.runners = [Runner(folder, rank) for rank in range(2)]
        self.hooks = [WholeCheckpointHook(by_epoch=False, interval=1, max_keep_ckpts=1) for _ in range(2)]
        for hook, rank in zip(self.hooks, ranks, strict=True):
            hook.out_dir, hook.filename_tmpl, hook.keep_ckpt_ids = str(folder), "iter_{}.pth", deque()
            hook._ranks = rank

    def both(self, do: Callable[[Any, Any], Any]) -> list[Exception | None]:
        """What `do(hook, runner)` raised on each rank; a rank that fails does not stop the other."""

        def one(rank: int) -> None:
            self._process.rank = rank
            do(self.hooks[rank], self.runners[rank])

        with ThreadPoolExecutor(2) as pool:
            return [done.exception() for done in [pool.submit(one, rank) for rank in range(2)]]

    def save(self, step: int) -> list[Exception | None]:
        return self.both(lambda hook, runner: hook._save_checkpoint_with_step(runner, step, meta={"iter": step}))

    def wait(self) -> list[Exception | None]:
        return self.both(lambda hook, _runner: hook.wait())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Memory of the machine."""
    from core.xtuner.runtime import snapshot

    memory = {"available_bytes": 2**40}
    monkeypatch.setattr(snapshot, "memory", lambda: memory)
    return memory


@pytest.fixture
def pair(tmp_path: Path, ranks: list[Any], free: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Pair:
    from mmengine._strategy import deepspeed

    from core.xtuner.runtime import checkpoint

    process = Process()
    monkeypatch.setattr(checkpoint, "is_main_process", lambda: process.rank == 0)
    # Both threads put their own in its place for a while; what is there at the end is the test's to restore.
    monkeypatch.setattr(deepspeed, "save_checkpoint", deepspeed.save_checkpoint)
    return Pair(tmp_path, ranks, process)


def held(checkpoint: Path) -> dict[str, list[float]]:
    import torch

    return {file.name: torch.load(file, weights_only=True)["weight"].tolist() for file in checkpoint.iterdir()}


def whole(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


def test_it_has_its_name_when_the_last_rank_has_written(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.xtuner.runtime import snapshot

    assert [*pair.save(1), *pair.wait()] == [None] * 4
    may_write, is_written, dump = [threading.Event(), threading.Event()], threading.Event(), snapshot.dump

    def slowly(content: Any, file: Path) -> None:
        rank = _NAMES.index(file.name)
        assert may_write[rank].wait(600)
        dump(content, file)
        is_written.set()

    monkeypatch.setattr(snapshot, "dump", slowly)
    assert pair.save(2) == [None, None]
    for runner in pair.runners:
        runner.weight += 7
    may_write[0].set()
    assert is_written.wait(600)
    assert whole(tmp_path) == ["iter_1.pth"], "rank 0 has written, but not rank 1"
    assert not any(hook._writing.done() for hook in pair.hooks)
    may_write[1].set()
    assert pair.both(lambda hook, runner: hook.after_train(runner)) == [None, None]
    assert held(tmp_path / "iter_2.pth") == {_NAMES[0]: [0, 0, 0], _NAMES[1]: [1, 1, 1]}, "of the step it was saved in"
    assert whole(tmp_path) == ["iter_2.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_2.pth")
    saving = read_json(tmp_path / "saving.json")
    assert (saving["count"], saving["behind"], saving["why"]) == (2, 2, None)
    assert not list(tmp_path.glob(".*"))


def test_saves_in_a_row_wait_for_both(pair: Pair, tmp_path: Path) -> None:
    for step in range(1, 6):
        assert pair.save(step) == [None, None]
    assert pair.wait() == [None, None]
    assert whole(tmp_path) == ["iter_5.pth"]
    assert read_json(tmp_path / "saving.json")["behind"] == 5


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_of_one_rank_is_heard_on_both(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    from core.xtuner.runtime import snapshot

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if Path(str(self.name)).name == _NAMES[failing] and self.tell() > 64:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    assert [*pair.save(1), *pair.wait()] == [None] * 4
    monkeypatch.setattr(snapshot, "open", Full, raising=False)
    assert pair.save(2) == [None, None]
    for hook in pair.hooks:
        hook._writing.exception(600)
    # At the next iteration: nothing is waited for there.
    errors = pair.both(lambda hook, runner: hook.after_train_iter(runner, 1))
    assert [getattr(error, "errno", None) for error in errors] == [errno.ENOSPC] * 2
    assert [f"rank {failing}" in str(error) for error in errors] == [failing == 1, failing == 0]
    assert whole(tmp_path) == ["iter_1.pth"], "the last whole one is still there"
    assert (tmp_path / "last_checkpoint").read_text().endswith("iter_1.pth")
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_rank_left_has_no_name(tmp_path: Path, ranks: list[Any]) -> None:
    """Rank 1 dies in the middle of its file; rank 0 has written all of its own. The next attempt removes the rest."""
    from core.xtuner.runtime.ranks import RankLost
    from core.xtuner.runtime.whole import remove_unfinished, write_together

    target, partial = tmp_path / "iter_4.pth", tmp_path / ".iter_4.pth.partial"
    partial.mkdir()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(write_together, ranks[0], partial, target, (partial / "0").touch)
        (partial / "1").write_text("half")
        del ranks[1]._group
        assert isinstance(first.exception(), RankLost)
    assert not target.exists()
    assert sorted(file.name for file in partial.iterdir()) == ["0", "1"], "rank 1 might still be writing"
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_fails_before_the_copy_leaves_nothing(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runner: Runner, out_dir: str, name: str, *_arguments: Any, **_options: Any) -> None:
        if runner is pair.runners[0]:
            (Path(out_dir) / name).mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Runner, "save_checkpoint", fail)
    assert [getattr(error, "errno", None) for error in pair.save(1)] == [errno.ENOSPC] * 2
    assert not list(tmp_path.iterdir())


def test_they_copy_together_or_not_at_all(pair: Pair, tmp_path: Path, free: dict[str, int]) -> None:
    """There is room for the copy of one of them, not of both."""
    free["available_bytes"] = 2 * 2**30 + 20
    assert pair.save(1) == [None, None]
    assert [hook._writing for hook in pair.hooks] == [None, None]
    assert held(tmp_path / "iter_1.pth") == {_NAMES[0]: [0, 0, 0], _NAMES[1]: [1, 1, 1]}
    assert [runner.logger.lines for runner in pair.runners] == [
        ["Training waits while checkpoints are written: a copy takes 0.0 GiB of memory, 2.0 GiB are free."]
    ] * 2
    free["available_bytes"] += 4
    assert [*pair.save(2), *pair.wait()] == [None] * 4
    saving = read_json(tmp_path / "saving.json")
    assert (saving["count"], saving["behind"], saving["why"]) == (2, 1, "memory")
    assert whole(tmp_path) == ["iter_2.pth"]


@pytest.mark.parametrize(
    ("local", "is_plain", "why"), [("2", True, None), ("1", True, "deepspeed"), ("2", False, "writer")]
)
def test_where_they_save_behind_and_where_not(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, local: str, is_plain: bool, why: str | None
) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from core.xtuner.runtime import checkpoint, ranks

    hook, runner = pair.hooks[0], pair.runners[0]
    hook._ranks = None
    runner.strategy.model.checkpoint_engine = TorchCheckpointEngine() if is_plain else SimpleNamespace()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(checkpoint, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoint, "new_group", lambda: SimpleNamespace(rank=lambda: 0))
    monkeypatch.setattr(ranks.distributed, "get_world_size", lambda: 2)
    hook._meet(runner)
    assert hook._must_wait == why
    assert (hook._ranks is not None) is (why is None)
    if why:
        assert checkpoint._REASONS[why]
        key = f"timing.why_{why}"
        assert catalog("en").text(key) != key != catalog("zh").text(key)


def test_without_the_optimizer_mmengine_writes_one_file(pair: Pair, tmp_path: Path) -> None:
    from mmengine._strategy import deepspeed

    from core.xtuner.runtime import snapshot

    kept, file = deepspeed.save_checkpoint, tmp_path / ".iter_4.pth.partial"
    files = snapshot.of_engine(
        lambda: deepspeed.save_checkpoint({"state_dict": {}}, str(file)), pair.runners[0].strategy.model
    )
    assert files == {file: {"state_dict": {}}}
    assert deepspeed.save_checkpoint is kept
    assert not file.exists()
