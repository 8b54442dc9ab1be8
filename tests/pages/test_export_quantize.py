"""The dialog of the 4-bit export: what it asks, what it refuses, what it starts; and the figures of one that was made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from core.checkpoints.companions import describe
from core.data.generate import Assistant, write_assistant
from core.environment import venv_cache
from core.files import write_json
from core.project import Project, open_project
from core.quantize.environment import find_environment, in_use
from tests.core.environment.fakes import script
from tests.models import write_tiny_internlm2, write_tiny_llama

EXPORT = str(Path(__file__).parents[2] / "pages/deliver/export.py")
FIGURES = {
    "method": "awq", "bits": 4, "group_size": 128, "data": "rows.json", "rows": 128, "tokens": 8123, "matrices": 14, "kept": 7,
    "weight_error": 0.1117, "worst_error": 0.1147, "worst_name": "model.layers.0.mlp.down_proj", "held_out_rows": 16,
    "loss_before": 1.25, "loss_after": 1.5, "versions": {"llmcompressor": "0.14.0.1"}, "device": "CPU",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "project").mkdir()
    return open_project(tmp_path / "project")


def dialog(project: Project, language: str = "en") -> AppTest:
    """The dialog alone, of the one model that the project delivered."""

    def page() -> None:
        import streamlit as st

        from core.checkpoints.deliverables import list_deliverables
        from core.project import open_project
        from pages.ui.export_quantize import quantize_dialog

        opened = open_project(st.session_state["root"])
        quantize_dialog(opened, list_deliverables(opened)[0])

    app = AppTest.from_function(page, default_timeout=30)
    app.session_state["root"] = project.root
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    return app


def build_environment() -> Path:
    folder = find_environment().folder
    script(folder / "bin" / "python", "exit 0")
    write_json(folder / venv_cache.MARK, {})
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "pages.ui.export_quantize.start_quantization",
        lambda _, path, *given, **options: calls.append((path.name, *given, options)),
    )
    return calls


@pytest.mark.parametrize("language", ["zh", "en"])
def test_it_starts_only_with_consent_and_data(language: str, project: Project, started: list[tuple[Any, ...]]) -> None:
    write_tiny_llama(project.final_model / "iter_4", dtype="bfloat16")
    assert dialog(project, language).warning
    write_assistant(project, Assistant(name="Danlu", author="Ada", rows=40))
    app = dialog(project, language)
    assert not app.warning
    assert not app.error
    assert any("final_model/iter_4-awq" in caption.value for caption in app.caption)
    assert app.button(key="quantize_start").disabled
    app.checkbox(key="quantize_install").check().run()
    app.radio(key="quantize_method").set_value("gptq").run()
    assert any("final_model/iter_4-gptq" in caption.value for caption in app.caption)
    app.number_input(key="quantize_rows").set_value(64)
    app.button(key="quantize_start").click().run()
    assert not app.exception
    data = project.data / "personal_assistant.json"
    assert started == [("iter_4", "gptq", {"data": data, "rows": 64, "max_length": 512, "may_install": True})]


def test_an_environment_that_is_there_is_named_and_can_be_deleted(
    project: Project, started: list[tuple[Any, ...]]
) -> None:
    write_tiny_llama(project.final_model / "iter_4", dtype="bfloat16")
    write_assistant(project, Assistant(name="Danlu", author="Ada", rows=40))
    folder = build_environment()
    app = dialog(project)
    assert any("llmcompressor 0.14.0.1 is installed" in caption.value for caption in app.caption)
    app.button(key="quantize_start").click().run()
    assert started[0][-1]["may_install"] is False
    app = dialog(project)
    with in_use(find_environment()):
        app.button(key="quantize_delete").click().run()
    assert "in use" in app.error[0].value
    app.button(key="quantize_delete").click().run()
    assert not app.exception
    assert not app.error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("write", "words"), [(write_tiny_internlm2, "code of its own"), (write_tiny_llama, "already exists")]
)
def test_what_stands_before_it_is_said(write: Callable[..., Path], words: str, project: Project) -> None:
    write(project.final_model / "iter_4", dtype="bfloat16")
    if write is write_tiny_llama:
        write_json(project.final_model / "iter_4-awq" / "notes.json", {})
    write_assistant(project, Assistant(name="Danlu", author="Ada", rows=40))
    build_environment()
    app = dialog(project)
    assert words in app.error[0].value
    assert app.button(key="quantize_start").disabled


@pytest.mark.parametrize("language", ["zh", "en"])
def test_figures_and_commands_of_one_that_was_made(
    language: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_llama(project.final_model / "iter_4-awq", dtype="bfloat16")
    origin = {"run": "train_1", "checkpoint": "iter_4.pth", "base_model": None, "prompt_template": None, "system": None}
    describe(folder, kind="awq", dtype="W4A16", details={"quantized": FIGURES}, **origin)
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    app = AppTest.from_file(EXPORT, default_timeout=30)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    shown = " ".join(markdown.value for markdown in app.markdown)
    assert all(figure in shown for figure in ("0.112", "0.115", "1.2500", "1.5000", "8123", "llmcompressor 0.14.0.1"))
    assert app.code[0].value.splitlines() == [
        f"vllm serve {folder}",
        f"lmdeploy serve api_server {folder} --backend turbomind",
    ]
