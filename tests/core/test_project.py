from pathlib import Path

import pytest

from core.errors import ConflictError, InputError
from core.project import create_project, list_projects, open_project, remember_project


def test_a_new_project_has_the_guides_layout(tmp_path: Path) -> None:
    project = create_project(tmp_path, "ft")
    folders = {folder.name for folder in project.root.iterdir()}
    assert {"data", "model", "config", "train", "huggingface", "final_model", ".danlu"} <= folders
    assert [found.name for found in list_projects(tmp_path)] == ["ft"]


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "a" * 65, "a\nb"])
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="bad_name"):
        create_project(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_chinese_names_are_names(tmp_path: Path) -> None:
    assert create_project(tmp_path, "小助手").root.is_dir()


def test_an_existing_project_is_not_made_again(tmp_path: Path) -> None:
    create_project(tmp_path, "ft")
    with pytest.raises(ConflictError):
        create_project(tmp_path, "ft")


def test_a_folder_made_by_hand_opens_and_keeps_its_files(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "ft"
    (outside / "data").mkdir(parents=True)
    (outside / "data" / "personal_assistant.json").write_text("[]", encoding="utf-8")
    project = open_project(outside)
    remember_project(home, project.root)
    assert (project.data / "personal_assistant.json").read_text(encoding="utf-8") == "[]"
    assert [found.root for found in list_projects(home)] == [outside]


def test_what_is_no_folder_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not_a_folder"):
        open_project(tmp_path / "missing")
