"""Files of an older app come forward with a copy kept; those of a newer one are refused and left alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from core.files import read_json, write_json
from core.project import SCHEMA_VERSION, create_project, list_projects, open_project, read_mark, remember_project
from core.runs.directory import RunDirectory
from core.schema import read_upgraded, upgraded

STEPS: dict[int, Callable[[Any], dict[str, Any]]] = {
    0: lambda names: {"names": list(names)},
    1: lambda value: {"names": dict.fromkeys(value["names"], 1)},
}


@pytest.mark.parametrize("old", [["a"], {"schema_version": 1, "names": ["a"]}])
def test_an_older_file_comes_forward_step_by_step_and_its_old_self_is_kept(tmp_path: Path, old: Any) -> None:
    file = tmp_path / "names.json"
    write_json(file, old)
    expected = {"schema_version": 2, "names": {"a": 1}}
    assert read_upgraded(file, 2, STEPS) == expected
    assert read_json(file) == expected
    (kept,) = (path for path in tmp_path.iterdir() if path != file)
    assert read_json(kept) == old
    written_at = file.stat().st_mtime_ns
    assert read_upgraded(file, 2, STEPS) == expected
    assert file.stat().st_mtime_ns == written_at


def test_the_kept_copy_is_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    for old in (["first"], ["second"]):
        write_json(file, old)
        read_upgraded(file, 2, STEPS)
    assert read_json(tmp_path / "names.json.v0") == ["first"]


def test_where_nothing_can_be_written_the_old_file_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "names.json"
    write_json(file, ["a"])

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("core.schema.shutil.copy2", refuse)
    assert read_upgraded(file, 2, STEPS)["names"] == {"a": 1}
    assert read_json(file) == ["a"]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"schema_version": 3}, "files.newer_schema"),
        ({"schema_version": "2"}, "files.broken_schema"),
        ({"schema_version": True}, "files.broken_schema"),
        ({"schema_version": 1}, "files.broken_schema"),
        (7, "files.broken_schema"),
        (None, "files.broken_schema"),
    ],
)
def test_what_cannot_be_read_is_said_and_left_alone(tmp_path: Path, value: Any, code: str) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_upgraded(file, 2, STEPS)
    assert caught.value.code == code
    assert json.loads(file.read_text(encoding="utf-8")) == value
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(InputError):
        upgraded(value, file, 2, STEPS)


def test_a_project_of_the_first_version_gets_an_id_once(tmp_path: Path) -> None:
    project = create_project(tmp_path, "ft")
    mark = project.private / "project.json"
    write_json(mark, {"schema_version": 1, "created_at": "2025-01-01T00:00:00+00:00"})
    first = read_mark(open_project(project.root))
    assert first == read_mark(project)
    assert (first["schema_version"], first["created_at"]) == (SCHEMA_VERSION, "2025-01-01T00:00:00+00:00")
    assert len(first["id"]) == 32
    assert read_json(mark.with_name("project.json.v1"))["schema_version"] == 1


def test_a_project_of_a_newer_app_is_refused_and_nothing_is_made_in_it(tmp_path: Path) -> None:
    newer = {"schema_version": SCHEMA_VERSION + 1, "what": "unknown"}
    write_json(tmp_path / "ft" / ".danlu" / "project.json", newer)
    with pytest.raises(InputError) as caught:
        open_project(tmp_path / "ft")
    assert caught.value.code == "files.newer_schema"
    assert [path.name for path in (tmp_path / "ft").iterdir()] == [".danlu"]
    assert read_json(tmp_path / "ft" / ".danlu" / "project.json") == newer


def test_the_list_of_projects_of_the_first_version_is_read(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    outside.mkdir()
    open_project(outside)
    write_json(home / ".danlu" / "projects.json", [str(outside)])
    assert [project.root for project in list_projects(home)] == [outside]
    remember_project(home, outside)
    assert read_json(home / ".danlu" / "projects.json") == {"schema_version": 1, "roots": [str(outside)]}


@pytest.mark.parametrize(
    ("change", "code"), [({"schema_version": 2}, "runs.newer_spec"), ({"schema_version": "x"}, "files.broken_schema")]
)
def test_a_run_of_a_newer_app_is_said_to_be_one(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    spec = {"id": "a", "kind": "train", "title": "a", "argv": ["x"], "cwd": "/", "created_at": "2025-01-01"}
    run = RunDirectory(tmp_path)
    write_json(run.spec_file, spec)
    assert run.spec().schema_version == 1
    assert read_json(run.spec_file) == spec
    write_json(run.spec_file, {**spec, **change})
    with pytest.raises(InputError) as caught:
        run.spec()
    assert caught.value.code == code
