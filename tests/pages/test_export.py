"""The export page: without a checkpoint, with a plan, with something delivered and what can be done with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from core.checkpoints.deliverables import deliver, list_deliverables
from core.checkpoints.staging import staging_folder
from core.checkpoints.verify import verify_merge
from core.files import write_json
from core.launchers.local import Gpu
from core.project import Project, open_project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.job import SilentProgress
from pages.ui.export_actions import actions_of
from tests.core.checkpoints.crafted import write_adapter, write_checkpoint
from tests.models import write_tiny_llama

SCRIPT = str(Path(__file__).parents[2] / "pages/deliver/export.py")
pytestmark = pytest.mark.engine


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = open_project(tmp_path)
    write_tiny_llama(made.model / "tiny")
    spec = RunSpec(id="first", kind="train", title="tiny", argv=[], cwd="/", created_at="2026-01-01T00:00:00+00:00")
    write_json(RunDirectory(made.train / "first").spec_file, spec.to_json())
    write_checkpoint(made.train / "first" / "iter_4.pth", made.model / "tiny")
    return made


def show(project: Project, monkeypatch: pytest.MonkeyPatch, language: str = "en") -> AppTest:
    """Page links lead to pages that only the router knows: here they are left out."""
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    return app


def make(project: Project, **options: Any) -> None:
    file = project.train / "first" / "iter_4.pth"
    deliver(str(project.root), str(file), "iter_4", verify=False, progress=SilentProgress(), **options)


def test_without_checkpoints_the_way_on_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = show(open_project(tmp_path), monkeypatch)
    assert any("No run has saved a checkpoint" in markdown.value for markdown in app.markdown)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_plan_says_what_it_needs_and_can_start(
    language: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = show(project, monkeypatch, language)
    assert sum(markdown.value.startswith("#### ") for markdown in app.markdown) == 3
    assert not app.error
    assert not app.button(key="export_start").disabled
    assert any("huggingface/iter_4" in caption.value for caption in app.caption)


def test_the_best_checkpoint_is_preselected(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(project.train / "first")
    shutil.copy(run.path / "iter_4.pth", run.path / "iter_8.pth")
    run.validation_file.write_text('{"iteration": 4, "loss": 1.5, "is_best": true}\n{"iteration": 8, "loss": 2.0}\n')
    chosen = show(project, monkeypatch).selectbox(key="export_checkpoint_first")
    assert chosen.value.endswith("iter_4.pth")
    assert [("best · validation loss 1.5000" in option) for option in chosen.options].count(True) == 1


def test_a_damaged_checkpoint_is_explained(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    file = project.train / "first" / "iter_4.pth"
    file.write_bytes(file.read_bytes()[:-50])
    app = show(project, monkeypatch)
    assert "cut short" in app.error[0].value
    assert not [button for button in app.button if button.key == "export_start"]


def test_a_gpu_can_be_chosen_where_there_is_one_and_the_job_asks_for_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "export_gpu" not in [toggle.key for toggle in show(project, monkeypatch).toggle]
    monkeypatch.setattr("pages.ui.export_choice.list_gpus", lambda: [Gpu(0, "GPU-1", "H100", 80 * 2**30, 0)])
    monkeypatch.setattr("core.checkpoints.deliverables.idle_gpu", lambda: "GPU-1")
    started: list[dict[str, Any]] = []
    monkeypatch.setattr("core.checkpoints.deliverables.start_job", lambda *_, **options: started.append(options))
    app = show(project, monkeypatch)
    assert not app.toggle(key="export_gpu").value
    app.toggle(key="export_gpu").set_value(True).run()
    app.button(key="export_start").click().run()
    app.toggle(key="export_merge").set_value(False).run()
    assert app.toggle(key="export_gpu").disabled
    app.button(key="export_start").click().run()
    assert not app.exception
    assert [(job["arguments"]["device"], job["gpus"]) for job in started] == [("cuda", ["GPU-1"]), ("cpu", [])]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_checked_model_shows_its_mark_its_figures_and_the_way_to_the_chat(
    language: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(project)
    verify_merge(str(project.final_model / "iter_4"), method="layers", progress=SilentProgress())
    app = show(project, monkeypatch, language)
    rows = [markdown.value for markdown in app.markdown if "/iter_4**" in markdown.value]
    assert len(rows) == 2
    assert sum("green-badge" in row for row in rows) == 1
    assert app.button(key="export_chat_final_model_iter_4")
    assert app.expander


def test_what_a_killed_merge_left_is_shown_and_removed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    part = staging_folder(project.final_model / "iter_4")
    write_json(part / ".plan.json", {"process": {"pid": 1, "started_ticks": 0, "boot_id": "gone"}, "plan": {}})
    app = show(project, monkeypatch)
    assert any("final_model/iter_4" in markdown.value for markdown in app.markdown)
    app.button(key="export_leftover_final_model/iter_4").click().run()
    assert not app.exception
    assert not part.exists()
    assert not [button for button in app.button if str(button.key).startswith("export_leftover")]


def test_what_can_be_done_depends_on_what_it_is(project: Project) -> None:
    make(project)
    found = {item.kind: actions_of(project, item) for item in list_deliverables(project)}
    assert found == {
        "adapter": ["upload", "remove"],
        "merged": ["gguf", "fp8", "quantize", "verify", "upload", "remove"],
    }
    (project.final_model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    own = next(item for item in list_deliverables(project) if item.path == project.final_model)
    assert actions_of(project, own) == ["gguf", "fp8", "quantize"]


def test_two_adapters_become_one_model_with_the_weights_and_the_method_chosen(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(item.key == "export_combine_start" for item in show(project, monkeypatch).button)
    for name in ("one", "two"):
        write_adapter(project.huggingface / name, project.model / "tiny")
    started: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        "pages.ui.export_combination.start_combination",
        lambda _, paths, weights, name, **options: started.append(([p.name for p in paths], {**options, "n": name})),
    )
    monkeypatch.setattr("pages.ui.export_choice.list_gpus", lambda: [Gpu(0, "GPU-1", "H100", 80 * 2**30, 0)])
    app = show(project, monkeypatch)
    app.toggle(key="export_combine_gpu").set_value(True).run()
    app.number_input(key="export_combine_weight_one").set_value(0.7).run()
    assert not [slider for slider in app.slider if slider.key == "export_combine_density"], "a sum keeps all"
    app.selectbox(key="export_combine_method").set_value("ties").run()
    assert any("huggingface/combined_" in caption.value for caption in app.caption)
    app.slider(key="export_combine_density").set_value(0.3).run()
    app.text_input(key="export_combine_name").set_value("both").run()
    app.button(key="export_combine_start").click().run()
    assert not app.exception
    assert sorted(started[0][0]) == ["one", "two"]
    assert started[0][1] == {"method": "ties", "density": 0.3, "verify": True, "device": "cuda", "n": "both"}
