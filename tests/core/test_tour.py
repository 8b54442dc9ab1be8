from pathlib import Path

import pytest

from core import tour
from core.errors import InputError
from core.journey import STEPS
from core.project import Project, create_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return create_project(tmp_path, "first")


def test_a_project_has_no_hints_until_they_are_asked_for(project: Project) -> None:
    assert not tour.has_hints(project)


def test_the_choice_is_kept_in_the_project(project: Project) -> None:
    tour.show_hints(project, True)
    assert tour.has_hints(Project(project.root))
    tour.show_hints(project, False)
    assert not tour.has_hints(Project(project.root))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"is_shown": "yes"}', "\ufeff"])
def test_a_broken_file_means_no_hints(project: Project, text: str) -> None:
    (project.private / "tour.json").write_text(text, encoding="utf-8")
    assert not tour.has_hints(project)


@pytest.mark.parametrize("author", ["", " ", "x" * 41, "{author}"])
def test_an_unusable_author_is_said_before_anything_is_made(tmp_path: Path, author: str) -> None:
    with pytest.raises(InputError) as caught:
        tour.start_tour(tmp_path, author=author)
    assert caught.value.code == "data.bad_assistant"
    assert not any(tmp_path.iterdir())


def test_the_tour_leads_through_every_step_once() -> None:
    seen = [STEPS[0]]
    while following := tour.next_page(seen[-1]):
        seen.append(following)
    assert tuple(seen) == STEPS
