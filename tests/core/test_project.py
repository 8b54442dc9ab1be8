import json
from pathlib import Path

import pytest

from core.errors import ConflictError, InputError
from core.project import create_project, list_projects, open_project, read_mark, remember_project


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


def test_a_first_project_makes_its_home_and_a_home_that_is_not_there_holds_none(tmp_path: Path) -> None:
    home = tmp_path / "work" / "projects"
    assert list_projects(home) == []
    assert create_project(home, "ft").root == home / "ft"


def test_every_project_from_elsewhere_stays_in_the_list_sorted_by_name(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("zeta", "alpha"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        remember_project(home, open_project(tmp_path / "elsewhere" / name).root)
    create_project(home, "midway")
    assert [found.name for found in list_projects(home)] == ["alpha", "midway", "zeta"]
    (tmp_path / "elsewhere" / "alpha" / ".danlu").rename(tmp_path / "gone")
    assert [found.name for found in list_projects(home)] == ["midway", "zeta"]


def test_a_list_of_an_older_app_is_read_and_kept(tmp_path: Path) -> None:
    """It was a plain list of folders once."""
    outside = open_project(folder_of(tmp_path / "outside")).root
    index = folder_of(tmp_path / "home" / ".danlu") / "projects.json"
    index.write_text(json.dumps([str(outside)]), encoding="utf-8")
    assert [found.root for found in list_projects(tmp_path / "home")] == [outside]
    remember_project(tmp_path / "home", open_project(folder_of(tmp_path / "another")).root)
    assert [found.name for found in list_projects(tmp_path / "home")] == ["another", "outside"]


def folder_of(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_a_broken_list_is_not_written_over(tmp_path: Path) -> None:
    index = folder_of(tmp_path / ".danlu") / "projects.json"
    index.write_text('{"schema_version": 1, "roots": "everywhere"}', encoding="utf-8")
    assert list_projects(tmp_path) == []
    with pytest.raises(InputError, match="broken_schema"):
        remember_project(tmp_path, tmp_path / "ft")
    assert "everywhere" in index.read_text(encoding="utf-8")


def test_a_project_keeps_its_id_when_it_is_opened_again_or_moved(tmp_path: Path) -> None:
    first = create_project(tmp_path, "ft")
    mark = read_mark(first)
    assert set(mark) == {"created_at", "id", "schema_version"}
    assert read_mark(open_project(first.root)) == mark
    assert read_mark(open_project(first.root.rename(tmp_path / "moved"))) == mark
    assert read_mark(create_project(tmp_path, "another"))["id"] != mark["id"]
