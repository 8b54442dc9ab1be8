"""What is remembered of runs that lie still, and that it is forgotten as soon as something moves."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from core.files import write_json
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.jobs import Listed, checkpoints_of, look_at_runs, version_of
from core.runs.launch import now_utc
from tests.core.runs.conftest import save_checkpoint
from tests.slow_disk import SlowDisk


@pytest.fixture
def run(project: Project) -> RunDirectory:
    made = RunDirectory(project.train / "one")
    made.path.mkdir(parents=True)
    save_checkpoint(made, 5)
    return made


def names(run: RunDirectory) -> list[str]:
    return [card.name for card in checkpoints_of(run)]


def test_checkpoints_that_lie_still_are_opened_once(run: RunDirectory) -> None:
    first = checkpoints_of(run)
    assert [(card.iteration, card.problem) for card in first] == [(5, None)]
    with SlowDisk(run.path) as disk:
        assert checkpoints_of(run) == first
    assert [name for name, _ in disk.calls] == ["listdir", "stat"]
    first.clear()  # what a page does with the list is its own affair
    assert names(run) == ["iter_5"]


def test_checkpoints_that_come_and_go_are_seen(run: RunDirectory) -> None:
    assert names(run) == ["iter_5"]
    saved = save_checkpoint(run, 10)
    assert names(run) == ["iter_10", "iter_5"]
    saved.unlink()
    assert names(run) == ["iter_5"]
    (run.path / "iter_5.pth").unlink()
    assert names(run) == []
    run.path.rmdir()
    assert names(run) == []


def test_one_that_is_written_over_in_the_same_tick_is_seen(run: RunDirectory) -> None:
    file = run.path / "iter_5.pth"
    before = file.stat()
    assert checkpoints_of(run)[0].is_complete
    other = save_checkpoint(run, 6)
    other.replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert checkpoints_of(run)[0].iteration == 6, "by what is in it"


def test_a_file_within_a_folder_is_seen(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.path / "iter_9.pth"
    folder.mkdir()
    part = folder / "part.pt"
    part.write_bytes(b"1")
    looked: list[Path] = []

    def look(path: Path) -> list[Any]:
        looked.append(path)
        return []

    monkeypatch.setattr("core.runs.jobs.list_checkpoints", look)
    for _ in range(2):
        checkpoints_of(run)
    assert len(looked) == 1
    part.write_bytes(b"22")
    checkpoints_of(run)
    assert len(looked) == 2


def test_a_damaged_one_is_looked_at_each_time(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that could not be read for a moment is not remembered as a broken checkpoint."""
    from core.checkpoints import inspect

    def fail(path: Path) -> Any:
        raise InputError("files.unreadable", path=str(path), reason="Stale file handle")

    with monkeypatch.context() as broken:
        broken.setattr(inspect, "open_checkpoint", fail)
        assert [card.is_complete for card in checkpoints_of(run)] == [False]
    assert [card.is_complete for card in checkpoints_of(run)] == [True]


@pytest.mark.parametrize("change", [lambda value: value | {"title": "b"}, lambda _: ["broken"]])
def test_a_run_json_in_the_place_of_another_is_read(
    project: Project, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    def fail(_: RunDirectory) -> RunSpec:
        raise InputError("files.unreadable", path="run.json", reason="Stale file handle")

    folder = project.train / "one"
    spec = RunSpec(id="one", kind="train", title="a", argv=["/x"], cwd="/", created_at=now_utc())
    write_json(folder / "run.json", spec.to_json())
    (listed,) = look_at_runs(project)
    assert listed == Listed(RunDirectory(folder), version_of((folder / "run.json").stat()))
    with monkeypatch.context() as broken:
        broken.setattr(RunDirectory, "spec", fail)
        assert listed.spec() is None
    assert listed.spec() == spec, "a disk that could not be read for a moment is not remembered"
    write_json(folder / "run.json", change(spec.to_json()))
    (later,) = look_at_runs(project)
    found = later.spec()
    assert (found.title if found else None) in ("b", None)
    assert found != spec


def test_a_work_dir_made_by_hand_has_no_spec(project: Project) -> None:
    scalars = project.train / "hand/20250101_000000/vis_data/scalars.json"
    scalars.parent.mkdir(parents=True)
    scalars.touch()
    (listed,) = look_at_runs(project)
    assert (listed.version, listed.spec()) == ((), None)
