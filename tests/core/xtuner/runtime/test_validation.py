"""The validation hook in mmengine's own runner, on a model of one weight: what it decides, keeps, ends and takes up again."""

import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.runs.directory import RunDirectory
from core.runs.validation import best_of, early_end, read_validations

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
STEPS = 8


@pytest.fixture
def run_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Train in `tmp_path`, from its last checkpoint if there is one; `losses` is what the validations find, one after the other."""
    import torch
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    from core.xtuner.runtime import validation
    from core.xtuner.runtime.checkpoint import WholeCheckpointHook
    from core.xtuner.runtime.hooks import LiveHook, StopHook

    class Tiny(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, inputs: Any, mode: str = "loss") -> Any:
            del mode
            return {"loss": (self.weight * inputs).square().sum()}

    class Asked(Hook):  # type: ignore[misc]
        """Asks for a stop in the middle of a step, as a person does."""

        def __init__(self, at: int | None) -> None:
            self._at = at

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            del batch_idx, data_batch
            if runner.iter + 1 == self._at:
                (tmp_path / "stop.request").touch()

    def train(losses: list[float], *, keep: int = 1, stop_at: int | None = None, **options: Any) -> list[float]:
        (tmp_path / "stop.request").unlink(missing_ok=True)
        resume, waiting = next(iter(tmp_path.glob("last_checkpoint")), None), list(losses)
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        monkeypatch.setattr(validation, "rows_of", lambda _config: {"length": []})
        monkeypatch.setattr(validation, "share", lambda *_arguments: [])
        monkeypatch.setattr(validation, "mean_loss", lambda _runner, _batches: (waiting.pop(0), 10))
        folder = str(tmp_path)
        runner = Runner(
            Tiny(),
            work_dir=folder,
            train_dataloader=torch.utils.data.DataLoader([{"inputs": torch.ones(4)}] * STEPS, batch_size=1),
            train_cfg={"by_epoch": False, "max_iters": STEPS},
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}},
            default_hooks={
                "checkpoint": {"type": WholeCheckpointHook, "by_epoch": False, "interval": 3, "max_keep_ckpts": keep},
                "logger": None,
            },
            custom_hooks=[
                {"type": Asked, "at": stop_at},
                {"type": validation.ValidationHook, "run": folder, "dataset": {}, "every_n_iters": 2, **options},
                {"type": LiveHook, "run": folder},
                {"type": StopHook, "run": folder},
            ],
            visualizer={"type": "Visualizer", "vis_backends": None},
            log_level="ERROR",
            default_scope="mmengine",
            experiment_name=uuid.uuid4().hex,  # mmengine keeps what it hears under this name for the life of the process
            load_from=resume.read_text() if resume else None,
            resume=resume is not None,
        )
        runner.train()
        return waiting

    return train


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


def seen(folder: Path) -> list[tuple[int, float]]:
    return [(each.iteration, each.loss) for each in read_validations(RunDirectory(folder))]


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_best_is_kept_beside_the_newest(run_training: Callable[..., Any], tmp_path: Path) -> None:
    """Saved every third step and at the end, one kept; validated before the first step, every second one and at the end."""
    assert run_training([9.0, 5.0, 3.0, 4.0, 4.5]) == []
    assert seen(tmp_path) == [(0, 9.0), (2, 5.0), (4, 3.0), (6, 4.0), (8, 4.5)]
    assert kept(tmp_path) == ["iter_4.pth", "iter_8.pth"]
    best = best_of(RunDirectory(tmp_path))
    assert best is not None
    assert (best.iteration, best.loss, best.checkpoint) == (4, 3.0, tmp_path / "iter_4.pth")
    assert early_end(RunDirectory(tmp_path)) is None
    assert steps(tmp_path) == [*range(1, STEPS + 1)]
    assert not list(tmp_path.glob(".*partial"))


def test_the_best_may_be_one_of_the_newest_and_outlive_them(run_training: Callable[..., Any], tmp_path: Path) -> None:
    run_training([9.0, 8.0, 7.0, 3.0, 3.5])
    assert kept(tmp_path) == ["iter_6.pth", "iter_8.pth"], "saved at 6 in its turn, then kept for being the best"


def test_only_the_newest_where_the_best_is_not_wanted(run_training: Callable[..., Any], tmp_path: Path) -> None:
    run_training([9.0, 5.0, 3.0, 4.0, 4.5], save_best=False)
    assert kept(tmp_path) == ["iter_8.pth"]
    best = best_of(RunDirectory(tmp_path))
    assert best is not None
    assert (best.iteration, best.checkpoint) == (4, None)


def test_nothing_is_removed_where_all_are_kept_but_what_was_only_the_best(
    run_training: Callable[..., Any], tmp_path: Path
) -> None:
    run_training([9.0, 5.0, 3.0, 2.0, 4.5], keep=-1)
    assert kept(tmp_path) == ["iter_3.pth", "iter_6.pth", "iter_8.pth"]


def test_it_ends_early_saved(run_training: Callable[..., Any], tmp_path: Path) -> None:
    """A loss that falls by less than asked is the best one, and no improvement."""
    assert run_training([9.0, 5.0, 4.9, 4.8, math.inf], patience=2, min_delta=0.5) == [math.inf]
    assert (steps(tmp_path)[-1], kept(tmp_path)) == (6, ["iter_6.pth"])
    end, best = early_end(RunDirectory(tmp_path)), best_of(RunDirectory(tmp_path))
    assert end is not None
    assert best is not None
    assert (end.iteration, end.patience, best.iteration) == (6, 2, 6)
    # Whoever goes on all the same gets as much patience as before.
    assert run_training([4.9], patience=2, min_delta=0.5) == []
    assert (steps(tmp_path)[-1], early_end(RunDirectory(tmp_path))) == (8, None)


def test_the_planned_end_is_no_early_one(run_training: Callable[..., Any], tmp_path: Path) -> None:
    assert run_training([9.0, 9.1, 9.2, 9.3, 9.4], patience=4) == []
    assert (steps(tmp_path)[-1], early_end(RunDirectory(tmp_path))) == (STEPS, None)


def test_a_loss_that_is_no_number_is_no_improvement(run_training: Callable[..., Any], tmp_path: Path) -> None:
    run_training([9.0, math.nan, math.nan], patience=2)
    assert (seen(tmp_path), steps(tmp_path)[-1]) == ([(0, 9.0)], 4)


def test_a_stop_does_not_wait_for_it_and_going_on_makes_up_for_it(
    run_training: Callable[..., Any], tmp_path: Path
) -> None:
    assert run_training([9.0, 5.0], stop_at=4) == []
    assert (seen(tmp_path), kept(tmp_path)) == ([(0, 9.0), (2, 5.0)], ["iter_2.pth", "iter_4.pth"])
    assert run_training([6.0, 7.0, 8.0]) == []
    assert seen(tmp_path) == [(0, 9.0), (2, 5.0), (4, 6.0), (6, 7.0), (8, 8.0)]
    assert kept(tmp_path) == ["iter_2.pth", "iter_8.pth"], "the best of before is known, and kept"


def test_what_was_the_best_goes_when_the_one_made_up_for_is_better(
    run_training: Callable[..., Any], tmp_path: Path
) -> None:
    assert run_training([9.0, 5.0], stop_at=4) == []
    assert run_training([4.0, 3.0, 7.0]) == []
    assert kept(tmp_path) == ["iter_6.pth", "iter_8.pth"]


def test_every_rank_gets_as_many_passes_and_every_label_counts_once() -> None:
    from core.xtuner.runtime.validation import share

    table = [{"input_ids": [1] * length, "labels": [-100, *[7] * (length - 1)]} for length in (3, 9, 5, 7, 4)]
    rows = Rows(table)
    whole = share(rows, 2, 0, 1)
    assert [[len(row["labels"]) for row in batch.rows] for batch in whole] == [[9, 7], [5, 4], [3]]
    assert [batch.predicted for batch in whole] == [14, 7, 2]
    two = [share(rows, 2, rank, 2) for rank in range(2)]
    assert [[batch.predicted for batch in batches] for batches in two] == [[14, 2], [7, 0]]
    more = [share(rows, 8, rank, 3) for rank in range(3)]
    assert [[batch.predicted for batch in batches] for batches in more] == [[23], [0], [0]]


class Rows(list[dict[str, Any]]):
    """A data set of rows, as the `datasets` library gives it."""

    def __getitem__(self, key: Any) -> Any:
        return [len(row["input_ids"]) for row in self] if key == "length" else super().__getitem__(key)
