"""How often a rerun of a page asks the disk. On a network share each question takes tens of milliseconds, so the number is the time."""

import shutil

import pytest

from core.project import Project
from tests.pages.conftest import Visit
from tests.slow_disk import SlowDisk

MORE_RUNS = 10
LIMITS = {
    "start": (70, 4), "environment": (60, 2), "launch": (95, 12), "monitor": (80, 3), "runs": (55, 8), "export": (330, 15),
}  # fmt: skip
"""Page → operations of a rerun in a small project, and for each run more. Lower them when a page asks less."""


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
    assert 0 < disk.count <= once + each_run * MORE_RUNS
