"""How often a rerun of a page asks the disk. On a network share each question takes tens of milliseconds, so the number is the time."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from core.files import read_json, write_json
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.jobs import look_at_runs
from core.runs.notes import Notes, write_notes
from core.runs.state import Phase
from core.runs.summary import RunSummary
from pages.ui.run_data import summaries_of
from tests.pages.conftest import Visit
from tests.slow_disk import SlowDisk

MORE_RUNS = 10
LIMITS = {
    "start": (75, 4), "environment": (60, 2), "launch": (75, 5), "monitor": (85, 3), "runs": (50, 6), "export": (220, 5),
}  # fmt: skip
"""Page → operations of a rerun in a small project, and at most for each finished run with a checkpoint more. Two of these are the
sidebar's: whether it is there, and how it ended. Lower them when a page asks less."""


@pytest.fixture(scope="module")
def many(stages: dict[str, Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("many") / "ft"
    shutil.copytree(stages["finished"].root, root)
    project = Project(root)
    first = next(file.parent for file in project.train.glob("*/run.json"))
    for number in range(MORE_RUNS):
        shutil.copytree(first, project.train / f"copy_{number}")
    return project


@pytest.mark.parametrize("page", LIMITS)
def test_a_rerun_asks_the_disk_so_often_and_no_more(many: Project, visit: Visit, page: str) -> None:
    app = visit(many, page)
    app.run()
    with SlowDisk(many.root) as disk:
        app.run()
    assert not app.exception
    once, each_run = LIMITS[page]
    runs = Counter(place.split("/")[1] for _, place in disk.calls if place.startswith("train/copy_"))
    assert len(runs) == MORE_RUNS, "it knows all of them"
    assert max(runs.values()) <= each_run
    assert disk.count - runs.total() <= once


def test_what_is_remembered_of_a_run_holds_until_the_disk_says_otherwise(
    stages: dict[str, Project], tmp_path: Path
) -> None:
    root = tmp_path / "ft"
    shutil.copytree(stages["finished"].root, root)
    project = Project(root)
    run = RunDirectory(project.train / "done")

    def row() -> RunSummary:
        (found,) = summaries_of(look_at_runs(project))
        return found

    assert (row().iteration, row().notes.text, row().status.phase) == (8, "", Phase.FINISHED)
    write_notes(run, Notes((), "seen"))
    assert row().notes.text == "seen"
    lines = run.metrics_file.read_text(encoding="utf-8")
    run.metrics_file.write_text(
        lines + lines.splitlines()[-1].replace('"iteration": 8', '"iteration": 9') + "\n", "utf-8"
    )
    assert row().iteration == 9
    write_json(run.state_file, read_json(run.state_file) | {"phase": "failed"})
    assert row().status.phase is Phase.FAILED
    write_json(run.spec_file, read_json(run.spec_file) | {"title": "another"})
    assert row().title == "another"
