"""What a run wrote about its validation, read back: losses, the best checkpoint, an early end, a validation under way."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import now_utc
from core.runs.metrics import COLUMNS, merge_resumes
from core.runs.progress import measure
from core.runs.validation import best_among, best_of, early_end, is_validating, read_validation
from core.runs.watch import Watch, read_alerts


def write(run: RunDirectory, *lines: dict[str, Any] | str) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    run.validation_file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def validated(iteration: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"iteration": iteration, "loss": loss, "is_best": False, "patience": 2, "ends": False, **more}


def test_losses_without_what_is_no_number_or_no_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert (read_validation(run), best_of(run), early_end(run)) == ([], None, None)
    write(run, validated(10, 2.0), validated(20, float("nan")), {"iteration": 30, "begun_at": 1.0}, "x", "{}")
    assert read_validation(run) == [(10, 2.0)]


def test_after_a_resume_what_had_come_later_does_not_count(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write(
        run, validated(0, 3.0, is_best=True), validated(10, 2.0, is_best=True), validated(20, 1.0, is_best=True),
        validated(10, 2.5, is_best=True),
    )  # fmt: skip
    assert read_validation(run) == [(0, 3.0), (10, 2.5)]
    best = best_of(run)
    assert best is not None
    assert (best.iteration, best.loss, best.checkpoint) == (10, 2.5, None)


def test_the_best_is_among_checkpoints_as_file_or_folder(tmp_path: Path) -> None:
    plain, sharded = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    for run in (plain, sharded):
        run.path.mkdir()
        write(run, validated(10, 2.0, is_best=True), validated(20, 2.5), validated(30, 2.6, ends=True))
    (plain.path / "iter_10.pth").touch()
    (plain.path / "iter_30.pth").touch()
    (sharded.path / "iter_10.pth").mkdir()
    found = [*plain.path.glob("iter_*"), *sharded.path.glob("iter_*")]
    assert best_among(found) == {plain.path / "iter_10.pth": 2.0, sharded.path / "iter_10.pth": 2.0}
    end = early_end(plain)
    assert end is not None
    assert (end.iteration, end.patience) == (30, 2)


def test_a_validation_under_way_is_seen_for_an_hour(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert not is_validating(run, 100.0)
    write(run, validated(10, 2.0), {"iteration": 20, "begun_at": 100.0})
    assert [is_validating(run, now) for now in (99.0, 100.0, 3600.0, 3800.0)] == [False, True, True, False]
    write(run, {"iteration": 20, "begun_at": 100.0}, validated(20, 1.0))
    assert not is_validating(run, 101.0)


def test_a_long_validation_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes without a step: an alert, but not while the run says that it validates."""
    for is_announced in (True, False):
        run = RunDirectory(tmp_path / str(is_announced))
        run.path.mkdir()
        spec = RunSpec(id="r", kind="train", title="r", argv=[], cwd=str(run.path), created_at=now_utc())
        watch, clock = Watch(run, spec, None), 1000.0
        monkeypatch.setattr(time, "monotonic", lambda clock=clock: clock)
        steps = [{"iteration": n, "loss": 1.0, "step_seconds": 1.0} for n in (1, 2, 3)]
        run.metrics_file.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
        watch.look()
        if is_announced:
            write(run, {"iteration": 3, "begun_at": time.time()})
        for later in (1300.0, 1600.0):
            monkeypatch.setattr(time, "monotonic", lambda later=later: later)
            watch.look()
        kinds = [alert.kind for alert in read_alerts(run)[0]]
        assert ("stalled" in kinds) is not is_announced


def test_remaining_time_counts_validations_shorter_than_a_few_steps() -> None:
    """Steps of 1 s, and 2 s of validation after every second one: 2 s an iteration, though no gap is five steps long."""
    at = np.cumsum([1.0 + 2.0 * (n % 2 == 0) for n in range(21)])
    rows = np.full((21, len(COLUMNS)), np.nan)
    for name, values in {
        "iteration": np.arange(1, 22), "total_iterations": np.full(21, 121), "at": at, "step_seconds": np.ones(21)
    }.items():  # fmt: skip
        rows[:, COLUMNS.index(name)] = values
    assert measure(merge_resumes(rows)).remaining_seconds == pytest.approx(100 * 2.0)
