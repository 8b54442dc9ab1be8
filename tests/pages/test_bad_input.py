"""What people bring that cannot work: each time the page says what and where, and what to do next; never a traceback."""

import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.environment import address
from core.project import Project
from tests.core.data.corpus import chat, good, lines
from tests.models import write_tiny_llama
from tests.pages import projects
from tests.pages.conftest import Visit, links
from tests.training import make_project

Usage = namedtuple("Usage", "total used free")
LANGUAGES = ("zh", "en")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return projects.write_empty(tmp_path / "project")


@pytest.fixture
def ready(tmp_path: Path) -> tuple[Project, Path]:
    """Model, data and config of a project that could train."""
    return make_project(tmp_path / "ready", write_tiny_llama)


def said(app: AppTest) -> str:
    """Everything the page says in words."""
    assert not app.exception
    boxes = (*app.error, *app.warning, *app.info, *app.markdown, *app.caption)
    return "\n".join([*(box.value for box in boxes), *(one.label for one in app.expander)])


def check_data(visit: Visit, project: Project, name: str, content: bytes, language: str = "en") -> str:
    (project.data / name).write_bytes(content)
    app = visit(project, "dataset", language)
    views = [control for control in app.segmented_control if (control.key or "").startswith("dataset_view_")]
    return said(views[0].set_value("check").run()) if views else said(app)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["empty.json", "empty.jsonl"])
def test_an_empty_file(visit: Visit, project: Project, name: str, language: str):
    words = check_data(visit, project, name, b"", language)
    assert ("The file is empty" if language == "en" else "文件是空的") in words


def test_invalid_json_at_a_line(visit: Visit, project: Project):
    words = check_data(visit, project, "bad.jsonl", lines(good(1), good(2), '{"messages": [', good(3)))
    assert "line 3" in words.lower()


def test_invalid_json_in_an_array(visit: Visit, project: Project):
    words = check_data(visit, project, "bad.json", b'[\n{"messages": []},\n{"messages" []}\n]\n')
    assert "line 3" in words.lower()


def test_wrong_roles(visit: Visit, project: Project):
    words = check_data(visit, project, "roles.jsonl", lines(good(1), chat(("teacher", "x"), ("pupil", "y"))))
    assert "teacher" in words
    assert "line 2" in words.lower()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_model_folder_without_config(visit: Visit, project: Project, tmp_path: Path, language: str):
    folder = write_tiny_llama(tmp_path / "no_config")
    (folder / "config.json").unlink()
    app = visit(project, "model", language)
    app.text_input(key="model_folder").set_value(str(folder)).run()
    for way in ("copy", "link"):
        app.button(key=f"model_{way}_folder").click().run()
        assert not app.exception
        what, _, next_step = app.error[0].value.partition("\n\n")
        assert str(folder) in what
        assert "config.json" in what
        assert next_step
    assert not list(project.model.iterdir())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_config_with_a_syntax_error(visit: Visit, ready: tuple[Project, Path], language: str):
    """The config page shows the line and lets it be mended; the launch page names file and line."""
    project, config = ready
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("max_epochs = 1", "max_epochs = = 1"), encoding="utf-8")
    line = str(text[: text.index("max_epochs = 1")].count("\n") + 1)
    app = visit(project, "config", language)
    assert line in app.error[0].value
    assert app.text_area(key="config_source_tiny").value.count("= = 1") == 1
    assert "config_drop_broken" not in {button.key for button in app.button}, "there is no good version to go back to"
    app = visit(project, "launch", language)
    what, _, next_step = app.error[0].value.partition("\n\n")
    assert line in what
    assert next_step
    assert "config" in links(app)
    assert "launch_start" not in {button.key for button in app.button}


def test_no_disk_space(visit: Visit, ready: tuple[Project, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(2**30, 2**30 - 2**20, 2**20))
    project, _ = ready
    app = visit(project, "launch")
    what, _, next_step = app.error[0].value.partition("\n\n")
    assert str(project.train) in what
    assert "GiB" in what
    assert next_step
    assert app.button(key="launch_start").disabled


@pytest.mark.parametrize(("locale", "word"), [("zh_CN.UTF-8", "端口"), ("en_US.UTF-8", "port")])
def test_a_port_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, locale: str, word: str):
    """`make run` asks before it starts the server."""
    monkeypatch.setenv("LANG", locale)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert address.main(["--port", str(port)]) == 1
    what, next_step = capsys.readouterr().err.strip().splitlines()
    assert str(port) in what
    assert word in what.lower()
    assert f"PORT={port + 1}" in next_step
