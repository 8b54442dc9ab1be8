"""The launch page: without a config, with one, with a config that cannot train, and at the start."""

from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from core.project import open_project
from core.runs import train
from tests.models import write_tiny_qwen2
from tests.training import make_project

SCRIPT = str(Path(__file__).parents[2] / "pages/train/launch.py")


def open_page(root: Path, language: str = "en") -> AppTest:
    app = AppTest.from_file(SCRIPT, default_timeout=30)
    app.session_state["project_root"] = str(root)
    app.session_state["language"] = language
    return app


def show(root: Path, monkeypatch: pytest.MonkeyPatch, language: str = "en") -> AppTest:
    """Page links lead to pages that only the router knows: here they are left out."""
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    app = open_page(root, language).run()
    assert not app.exception
    return app


def test_an_empty_project_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = show(open_project(tmp_path).root, monkeypatch)
    assert any("no training config" in markdown.value for markdown in app.markdown)
    assert not app.button


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_config_shows_its_facts_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    project, _ = make_project(tmp_path / "p", write_tiny_qwen2)
    app = show(project.root, monkeypatch, language)
    assert any("LoRA" in caption.value and "rows.jsonl" in caption.value for caption in app.caption)
    assert "torch.distributed.run" in app.code[0].value
    assert not app.error
    assert not app.button(key="launch_start").disabled


def test_a_missing_model_is_an_error_with_a_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, config = make_project(tmp_path / "p", write_tiny_qwen2)
    config.write_text(config.read_text().replace("/tiny", "/gone"))
    app = show(project.root, monkeypatch)
    assert "does not exist" in app.error[0].value
    assert not app.button


def test_start_makes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, _ = make_project(tmp_path / "p", write_tiny_qwen2)
    launched: list[Any] = []

    def launch(_parent: Path, spec: Any) -> Any:
        launched.append(spec)
        return train.RunDirectory(project.train / spec.id)

    monkeypatch.setattr(train, "launch", launch)
    monkeypatch.setattr("streamlit.switch_page", lambda *_args, **_options: None)
    app = show(project.root, monkeypatch)
    app.text_input(key="launch_name").input("mine").run()
    app.button(key="launch_start").click().run()
    assert not app.exception
    assert [spec.id for spec in launched] == ["mine"]
    assert (project.train / "mine/source/tiny.py").read_text() == (project.config / "tiny.py").read_text()


def test_a_project_without_checkpoints_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, _ = make_project(tmp_path / "p", write_tiny_qwen2)
    app = show(project.root, monkeypatch)
    app.toggle(key="launch_resume").set_value(True).run()
    assert not app.exception
    assert any("no complete checkpoint" in caption.value for caption in app.caption)
