"""The pages that read most of a project whose state files were all cut in half, as a crash of the machine may leave them."""

import shutil
from pathlib import Path

import pytest

from core.project import Project
from tests.pages.conftest import Visit

KEPT = ("project.json",)
"""Without its version nothing of a project is touched: that page is another test."""


@pytest.fixture(scope="module")
def broken(stages: dict[str, Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("broken") / "ft"
    shutil.copytree(stages["finished"].root, root)
    project = Project(root)
    for file in root.rglob("*.json*"):
        if not file.is_relative_to(project.model) and not file.is_relative_to(project.data) and file.name not in KEPT:
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
    return project


@pytest.mark.parametrize("page", ["environment", "launch", "monitor", "runs", "export", "chat"])
def test_a_page_opens_all_the_same(broken: Project, visit: Visit, page: str) -> None:
    visit(broken, page)


def test_a_project_of_a_newer_app_is_refused_in_words(stages: dict[str, Project], visit: Visit, tmp_path: Path) -> None:
    mark = tmp_path / "ft" / ".danlu" / "project.json"
    mark.parent.mkdir(parents=True)
    mark.write_text('{"schema_version": 99}', encoding="utf-8")
    page = visit(Project(tmp_path / "ft"), "runs")
    assert "newer version" in page.error[0].value
    assert [path.name for path in (tmp_path / "ft").iterdir()] == [".danlu"]
