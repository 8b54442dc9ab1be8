"""The launch page's memory and time panels, and its buttons that mend the config."""

from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from core.config.library import keep_draft, open_draft
from core.config.source import ConfigSource
from core.launchers import local
from core.launchers.local import Gpu
from core.project import Project
from core.runs.directory import RunDirectory
from tests.models import write_tiny_qwen2
from tests.training import make_project

SCRIPT = str(Path(__file__).parents[2] / "pages/train/launch.py")
H100 = Gpu(index=0, uuid="GPU-a", name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 2**30, used_bytes=2**30)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    return make_project(tmp_path / "p", write_tiny_qwen2)[0]


def show(project: Project, language: str = "en") -> AppTest:
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    return app


def words(app: AppTest) -> str:
    return "\n".join(element.value for element in [*app.markdown, *app.caption, *app.success, *app.error])


def config(project: Project) -> ConfigSource:
    return ConfigSource((project.config / "tiny.py").read_text())


@pytest.mark.parametrize(
    ("language", "verdict", "time"), [("en", "It fits.", "micro-steps"), ("zh", "放得下。", "次参数更新")]
)
def test_on_a_cpu_a_card_is_assumed(project: Project, language: str, verdict: str, time: str) -> None:
    app = show(project, language)
    assert app.selectbox(key="launch_card_size").value == 24
    assert verdict in words(app)
    assert time in words(app)


def test_a_model_that_is_not_here_has_no_budget_but_a_reason(project: Project) -> None:
    source = config(project).set("pretrained_model_name_or_path", "/gone/model")
    (project.config / "tiny.py").write_text(source.text)
    app = show(project)
    assert "The config's model is not on this machine" in words(app)


def test_a_card_has_a_price(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pages.ui.launch_memory", "pages.ui.launch_time", "pages.ui.launch_cluster", "core.launchers.local"):
        monkeypatch.setattr(f"{module}.list_gpus", lambda: [H100])
    assert local.list_gpus() == [H100]
    app = show(project)
    assert "data sheet of NVIDIA H100" in words(app)
    app.number_input(key="launch_rate").set_value(2.5).run()
    assert "Cost about" in words(app)
    again = show(project)
    assert again.number_input(key="launch_rate").value == 2.5


def test_a_dry_run_is_started_beside_the_config(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def launch(_parent: Path, spec: Any) -> RunDirectory:
        started.append(spec)
        return RunDirectory(project.train / spec.id)

    for module in ("pages.ui.launch_memory", "pages.ui.launch_time", "pages.ui.launch_cluster", "core.launchers.local"):
        monkeypatch.setattr(f"{module}.list_gpus", lambda: [H100])
    monkeypatch.setattr("core.runs.train.launch", launch)
    monkeypatch.setattr("streamlit.switch_page", lambda *_args, **_options: None)
    before = config(project).text
    app = show(project)
    app.button(key="launch_dry_run").click().run()
    assert not app.exception
    assert [(spec.id, spec.gpus, spec.details["config"]["name"]) for spec in started] == [
        ("dry_run", ["GPU-a"], "tiny_dry_run")
    ]
    run = (project.train / "dry_run" / "source" / "tiny_dry_run.py").read_text()
    assert ConfigSource(run).get("train_cfg.max_iters") == 6
    assert config(project).text == before


def test_a_finding_is_mended_in_the_config(project: Project) -> None:
    (project.config / "tiny.py").write_text(config(project).set("lr", 0.5).text)
    app = show(project)
    button = next(button for button in app.button if str(button.key).startswith("launch_fix_learning_rate"))
    button.click().run()
    assert not app.exception
    assert config(project).get("lr") == 2e-4
    assert not [button for button in app.button if str(button.key).startswith("launch_fix_learning_rate")]
    kept = [file.read_text() for file in (project.private / "versions").iterdir()]
    assert any("lr = 0.5" in text for text in kept)


def test_everything_that_can_be_mended_is_mended_at_once(project: Project) -> None:
    wrong = config(project).set("lr", 0.5).set("SYSTEM", "as {json}").set("save_steps", 7)
    (project.config / "tiny.py").write_text(wrong.text)
    app = show(project)
    assert app.button(key="launch_start").disabled
    app.button(key="launch_fix_all").click().run()
    assert not app.exception
    assert not [button for button in app.button if str(button.key).startswith("launch_fix_")]
    assert not app.button(key="launch_start").disabled
    assert (config(project).get("lr"), config(project).get("SYSTEM")) == (2e-4, "as {{json}}")


def test_unsaved_edits_are_not_lost(project: Project) -> None:
    (project.config / "tiny.py").write_text(config(project).set("lr", 0.5).text)
    draft = open_draft(project, "tiny")
    mine = ConfigSource(draft.text).set("max_epochs", 9).text
    keep_draft(project, type(draft)(draft.name, mine, draft.saved_text))
    app = show(project)
    next(button for button in app.button if str(button.key).startswith("launch_fix_learning_rate")).click().run()
    assert any("unsaved edits" in error.value for error in app.error)
    assert config(project).get("lr") == 0.5
    assert open_draft(project, "tiny").text == mine


def test_a_start_is_mended_by_another_choice(project: Project) -> None:
    """ZeRO-3 with 4-bit weights: the button chooses ZeRO-2, the config stays."""
    from core.config.edits import set_method

    (project.config / "tiny.py").write_text(set_method(config(project), "qlora").text)
    before = config(project).text
    app = show(project)
    chooser = next(box for box in app.selectbox if str(box.key).startswith("launch_deepspeed_"))
    chooser.select("deepspeed_zero3").run()
    next(button for button in app.button if str(button.key).startswith("launch_fix_qlora_zero3")).click().run()
    chooser = next(box for box in app.selectbox if str(box.key).startswith("launch_deepspeed_"))
    assert chooser.value == "deepspeed_zero2"
    assert config(project).text == before


def test_a_way_to_need_less_is_taken(project: Project) -> None:
    app = show(project)
    app.button(key="launch_option_rank").click().run()
    assert not app.exception
    assert config(project).get("model.lora.r") == 16
