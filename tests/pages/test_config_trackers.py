"""The form offers only services whose package is installed, puts the choice into the draft, and says what is missing."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.config.library import open_draft
from core.config.source import ConfigSource
from core.config.trackers import read_trackers
from core.project import open_project

SCRIPT = """
from pathlib import Path
import streamlit as st
from core.config.library import open_draft
from core.config.source import ConfigSource
from core.project import open_project
from pages.ui.config_trackers import choose_trackers

project = open_project(Path({root!r}))
choose_trackers(project, "one", ConfigSource(open_draft(project, "one").text))
"""


@pytest.mark.parametrize(("language", "words"), [("en", "is never written to a file"), ("zh", "密钥不会写入任何文件")])
def test_a_service_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, words: str) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(
        "pages.ui.config_trackers.installed_versions", lambda _python: {"wandb": "0.20", "tensorboard": "2.21"}
    )
    root = tmp_path / "p"
    root.mkdir()
    project = open_project(root)
    (project.config / "one.py").write_text("visualizer = None\n")
    app = AppTest.from_string(SCRIPT.format(root=str(root)), default_timeout=240)
    app.session_state["language"] = language
    app.run()
    assert app.multiselect[0].options == ["TensorBoard", "Weights & Biases"]
    assert any("mlflow, swanlab" in caption.value for caption in app.caption)
    app.multiselect[0].select("wandb").run()
    assert any(words in caption.value and "WANDB_API_KEY" in caption.value for caption in app.caption)
    app.toggle[0].set_value(True).run()
    assert not any(words in caption.value for caption in app.caption), "offline needs no key"
    assert not app.exception
    choice = read_trackers(ConfigSource(open_draft(project, "one").text))
    assert ([tracker.key for tracker in choice.trackers], choice.is_offline) == (["wandb"], True)
