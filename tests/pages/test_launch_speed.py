"""The speed panel of the launch page: what its switches ask for, and what a measured table offers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from core.config.source import ConfigSource
from core.project import Project
from core.runs import speed_table
from core.runs.speed_table import Measured, key_of, remember, remembered, setting_of
from core.xtuner.runtime.speed import parts
from tests.models import write_tiny_qwen2
from tests.training import make_project

SCRIPT = str(Path(__file__).parents[2] / "pages/train/launch.py")


@pytest.fixture
def place(tmp_path: Path) -> tuple[Project, Path]:
    return make_project(tmp_path / "p", write_tiny_qwen2, accumulative_counts=4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the page plans with, in turn."""
    from core.runs import train

    seen: list[Any] = []
    plan = train.plan

    def remembering(project: Project, request: Any, start: Any = None) -> Any:
        seen.append(request.speed)
        return plan(project, request, start)

    monkeypatch.setattr(train, "plan", remembering)
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    return seen


def show(project: Project, language: str = "en") -> AppTest:
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    return app


def test_everything_is_on_until_a_person_says_otherwise(place: tuple[Project, Path], asked: list[Any]) -> None:
    app = show(place[0])
    assert asked[-1] == "auto"
    app.checkbox(key=f"launch_speed_{parts.BLOCK_ATTENTION}").uncheck().run()
    assert asked[-1] == {"parts": [part for part in parts.ALL if part != parts.BLOCK_ATTENTION]}
    app.checkbox(key=f"launch_speed_{parts.FAST_PASS}").uncheck().run()
    assert asked[-1] == {"parts": [parts.OPTIMIZER]}
    assert app.checkbox(key=f"launch_speed_{parts.NORM}").disabled
    app.toggle(key="launch_speed").set_value(False).run()
    assert asked[-1] == "off"
    assert not app.exception


def test_a_measured_table_is_shown_and_applied_on_consent(place: tuple[Project, Path], asked: list[Any]) -> None:
    project, config = place
    source = ConfigSource(config.read_text())
    stock = setting_of(source)
    fast = speed_table.Setting(
        batch_size=2, accumulation=2, checkpointing=False, speed={"parts": "auto", "tokens_per_pass": 128}
    )
    rows = [
        Measured(setting=stock, tokens_per_second=100.0, memory_bytes=2**30),
        Measured(setting=fast, tokens_per_second=650.0, parts=("fast_pass",), tokens_per_pass=128),
        Measured(setting=stock, tokens_per_second=None, failure="train.out_of_memory"),
    ]
    key = key_of(project, source, card="CPU")
    remember(
        project, key, {"rows": [row.to_json() for row in rows], "at": "2026-01-02T03:04:05+00:00", "applied": False}
    )
    for language in ("zh", "en"):
        app = show(project, language)
        assert list(app.dataframe[0].value.iloc[:2, 2]) == ["1.0×", "6.5×"]
    assert asked[-1] == "auto", "measured is not applied"
    app.button(key="launch_tune_apply").click().run()
    assert not app.exception
    assert asked[-1] == {"parts": list(parts.ALL), "tokens_per_pass": 128}
    edited = ConfigSource(config.read_text())
    assert setting_of(edited) == replace(fast, speed="off")
    found = remembered(project, edited, gpu=None)
    assert found is not None
    assert found.applied
    assert "launch_tune_apply" not in {button.key for button in app.button}


def test_the_button_starts_a_job(
    place: tuple[Project, Path], asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.runs import autotune

    started: list[Any] = []
    monkeypatch.setattr(autotune, "start_job", lambda *arguments, **options: started.append((arguments, options)))
    app = show(place[0])
    app.button(key="launch_tune").click().run()
    assert not app.exception
    assert started[0][0][1] == "core.runs.autotune:measure"
    assert started[0][1]["arguments"]["config"] == str(place[1])


def test_without_a_model_there_is_nothing_to_measure(place: tuple[Project, Path], asked: list[Any]) -> None:
    project, config = place
    config.write_text(config.read_text().replace("/tiny", "/gone"))
    app = show(project)
    assert "launch_tune" not in {button.key for button in app.button}
