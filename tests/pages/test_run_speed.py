"""The monitor says which parts of the speed layer a run uses, and why it does not use the others."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.config.source import ConfigSource
from core.files import write_json
from core.messages import message
from core.project import Project
from core.runs.request import TrainRequest
from core.runs.saving import SAVING_FILE
from core.runs.speed_table import Measured, card_name, key_of, remember, setting_of
from core.runs.startup import STARTUP_FILE
from core.runs.train import plan
from core.xtuner.runtime.speed import parts
from tests.models import write_tiny_qwen2
from tests.training import make_project

SCRIPT = str(Path(__file__).parents[2] / "pages/train/monitor.py")
LINE = '{"iteration": 1, "epoch": 0.5, "total_iterations": 2, "loss": 2.0, "lr": 0.1, "tokens": 64, "step_seconds": 1, "at": 1}\n'


def make_run(root: Path, speed: str) -> tuple[Project, Path]:
    project, config = make_project(root / "p", write_tiny_qwen2)
    folder = project.train / "one"
    folder.mkdir(parents=True)
    (folder / "source").mkdir()
    (folder / "source" / "tiny.py").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    write_json(folder / "run.json", plan(project, TrainRequest(config=config, name="two", speed=speed)).to_json())
    (folder / "metrics.jsonl").write_text(LINE, encoding="utf-8")
    return project, folder


def write_measured(project: Project, folder: Path) -> None:
    """Measured with this config on this machine: stock, the layer, and the layer without one part."""
    source = ConfigSource((folder / "source" / "tiny.py").read_text(encoding="utf-8"))
    stock = setting_of(source)
    on = [parts.FAST_PASS, parts.BLOCK_ATTENTION, parts.GROUPED]
    rows = (
        Measured(setting=stock, tokens_per_second=100.0),
        Measured(setting=replace(stock, speed="auto"), tokens_per_second=300.0, parts=(*on,)),
        Measured(setting=replace(stock, speed={"parts": on[:2]}), tokens_per_second=200.0, parts=(*on[:2],)),
    )
    table = {"rows": [row.to_json() for row in rows], "at": "2026-11-25T10:00:00+00:00", "applied": False}
    remember(project, key_of(project, source, card=card_name(None)), table)


def show(project: Project, language: str, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    app.run()
    assert not app.exception
    return app


@pytest.mark.parametrize(
    ("language", "words"),
    [
        (
            "en",
            """4 of 9 parts in use|8 micro-batches|flash attention over all samples|needs Triton
            3.0 × as fast|**× 1.50**|imports 3.1 s, first step 0.4 s|still for 0.2 s|1 of them were""",
        ),
        (
            "zh",
            """共 9 项，启用了 4 项|8 个微批次|所有样本一起做 flash attention|需要 Triton
            原版 XTuner 的 3.0 倍|**× 1.50**|导入库 3.1 秒，第一步 0.4 秒|停顿 0.2 秒|其中 1 个""",
        ),
    ],
)
def test_parts_and_reasons_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, words: str
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
    write_measured(project, folder)
    write_json(folder / STARTUP_FILE, {"began_at": 2.0, "seconds": {"imports": 3.1, "model": 0.01, "first_step": 0.4}})
    write_json(folder / SAVING_FILE, {"count": 3, "behind": 2, "waited_seconds": 0.25, "why": "memory"})
    assert parts.read_reports(folder) == finished
    app = show(project, language, monkeypatch)
    shown = "\n".join([box.label for box in app.expander] + [text.value for text in [*app.markdown, *app.caption]])
    assert [word for word in re.split(r"\s*[|\n]\s*", words) if word not in shown] == []
    assert "0.01" not in shown, "a phase that nobody would feel"


def test_a_run_without_the_layer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, _ = make_run(tmp_path, "off")
    app = show(project, "en", monkeypatch)
    assert any("speed layer is off" in caption.value for caption in app.caption)
