"""The monitor says which parts of the speed layer a run uses, and why it does not use the others."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.files import write_json
from core.messages import message
from core.project import Project
from core.runs.train import TrainRequest, plan
from core.xtuner.runtime.speed import parts
from tests.models import write_tiny_qwen2
from tests.training import make_project

SCRIPT = str(Path(__file__).parents[2] / "pages/train/monitor.py")
LINE = '{"iteration": 1, "epoch": 0.5, "total_iterations": 2, "loss": 2.0, "lr": 0.1, "tokens": 64, "step_seconds": 1, "at": 1}\n'


def make_run(root: Path, speed: str) -> tuple[Project, Path]:
    project, config = make_project(root / "p", write_tiny_qwen2)
    folder = project.train / "one"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", plan(project, TrainRequest(config=config, name="two", speed=speed)).to_json())
    (folder / "metrics.jsonl").write_text(LINE, encoding="utf-8")
    return project, folder


def show(project: Project, language: str, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    app = AppTest.from_file(SCRIPT, default_timeout=30)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    return app


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", ["4 of 9 parts in use", "8 micro-batches", "flash attention over all samples", "needs Triton"]),
        ("zh", ["共 9 项，启用了 4 项", "8 个微批次", "所有样本一起做 flash attention", "需要 Triton"]),
    ],
)
def test_parts_and_reasons_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, words: list[str]
) -> None:
    project, folder = make_run(tmp_path, "auto")
    reports = parts.Reports(parts.Wish())
    attention = message("speed.on.flash")
    reports.on(parts.FAST_PASS, message("speed.on.fast_pass", dtype="bfloat16", attention=attention, tokens=4096))
    reports.on(parts.BLOCK_ATTENTION)
    reports.on(parts.GROUPED, message("speed.on.grouped", count=8, tokens=16384))
    reports.on(parts.OPTIMIZER)
    finished = reports.finish(message("speed.left.no_triton"))
    write_json(folder / parts.REPORT_FILE, [report.to_json() for report in finished])
    assert parts.read_reports(folder) == finished
    app = show(project, language, monkeypatch)
    shown = "\n".join([*(box.label for box in app.expander), *(text.value for text in app.markdown)])
    assert all(word in shown for word in words)


def test_a_run_without_the_layer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, _ = make_run(tmp_path, "off")
    app = show(project, "en", monkeypatch)
    assert any("speed layer is off" in caption.value for caption in app.caption)
