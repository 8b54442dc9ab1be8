"""The monitor and the list of runs: every kind of run, every view, both languages, and what the buttons do."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from core.errors import ConflictError
from core.files import write_json
from core.project import Project, create_project
from core.runs.control import request_stop
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, now_utc
from core.runs.notes import Notes, read_notes, write_notes
from core.runs.state import Phase, read_status
from core.runs.watch import project_rules_file, read_rules
from tests.waiting import has_stopped

ROOT = Path(__file__).parents[2]
VIEWS = ("curves", "hardware", "samples", "log", "alerts", "details")


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = create_project(tmp_path, "p")
    yield made
    for spec in made.train.glob("*/run.json"):
        run = RunDirectory(spec.parent)
        with suppress(ConflictError):  # it may end by itself, the one that waited for another too
            request_stop(run, "cancel")
        assert has_stopped(run, 240)


def write_history(run: RunDirectory, steps: int, gpus: int) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    began = time.time() - steps
    with open(run.metrics_file, "a", encoding="utf-8") as stream:
        for step in range(1, steps + 1):
            line = {"iteration": step, "total_iterations": 100, "loss": 3 / step if step != 7 else math.nan, "lr": 1e-4}
            line |= {"grad_norm": 0.5, "tokens": 10, "step_seconds": 1.0, "data_seconds": 0.1, "memory_bytes": 2**30}
            stream.write(json.dumps(line | {"at": began + step}) + "\n")
    with open(run.gpu_file, "a", encoding="utf-8") as stream:
        for step in range(0, steps, 2):
            cards = [
                {"index": n, "uuid": f"GPU-{n}", "utilization_percent": 90, "power_watts": 300} for n in range(gpus)
            ]
            sample = {"at": began + step, "gpus": cards, "cpu_percent": 50.0, "ram_used_bytes": 2**30}
            stream.write(json.dumps(sample) + "\n")
    answer = {"iteration": 0, "prompt": "你好", "answer": "<b>not bold</b>"}
    run.samples_file.write_text(json.dumps(answer) + "\n", encoding="utf-8")
    run.validation_file.write_text('{"iteration": 5, "loss": 1.25}\n', encoding="utf-8")


def start(project: Project, name: str, code: str, *, steps: int = 20, gpus: int = 0) -> RunDirectory:
    run = RunDirectory(project.train / name)
    if steps:
        write_history(run, steps, gpus)
    spec: dict[str, Any] = {"id": name, "kind": "train", "title": name, "cwd": str(ROOT), "created_at": now_utc()}
    spec["details"] = {"config": {"name": "tiny"}}
    return launch(project.train, RunSpec(argv=[sys.executable, "-c", code], stop_seconds=5.0, **spec))


def save_checkpoint(run: RunDirectory, iteration: int) -> None:
    state = {"meta": {"iter": iteration}, "state_dict": {"llm.x": torch.zeros(2)}, "optimizer": {"state": {}}}
    torch.save(state, run.path / f"iter_{iteration}.pth")


def wait_for(run: RunDirectory, *phases: Phase) -> None:
    deadline = time.monotonic() + 240
    while read_status(run).phase not in phases:
        assert time.monotonic() < deadline, read_status(run)
        time.sleep(0.05)


def show(project: Project, page: str, monkeypatch: pytest.MonkeyPatch, language: str = "en", **state: Any) -> AppTest:
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    monkeypatch.setattr("streamlit.delta_generator.DeltaGenerator.page_link", lambda *_args, **_options: None)
    app = AppTest.from_file(str(ROOT / f"pages/train/{page}.py"), default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    for key, value in state.items():
        app.session_state[key] = value
    app.run()
    assert not app.exception, app.exception
    return app


def texts(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info, app.warning, app.error, app.success, app.text)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_every_view_of_a_live_run(project: Project, monkeypatch: pytest.MonkeyPatch, language: str, gpus: int) -> None:
    run = start(project, "live", "import time; time.sleep(86400)", gpus=gpus)
    save_checkpoint(run, 10)
    alert = {"kind": "spike", "level": "warning", "subject": "", "since": time.time(), "iteration": 9, "until": None}
    write_json(
        run.alerts_file,
        {"alerts": [alert | {"params": {"loss": 3.5, "usual": 1.5}}], "webhook": {"sent": 2, "failed": 1}},
    )
    with open(run.validation_file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"iteration": 20, "begun_at": time.time() - 60}) + "\n")
    for view in VIEWS:
        app = show(project, "monitor", monkeypatch, language, monitor_view=view)
        assert any(info.icon == ":material/fact_check:" for info in app.info), "why no step comes"
        assert "3.5" in texts(app), "an open alert is above every view"
        assert app.button(key="monitor_stop_save").label
        assert app.button(key="monitor_cancel").label


def test_waiting_run_says_for_whom(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    start(project, "first", "import time; time.sleep(86400)")
    second = start(project, "second", "pass", steps=0)
    assert read_status(second).phase is Phase.QUEUED
    app = show(project, "monitor", monkeypatch, monitor_run="second")
    assert "first" in app.info[0].value
    assert "by itself" in app.info[0].value


def test_stopped_run_goes_on_with_a_button(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(project, "one", "import sys; sys.exit(1)")
    wait_for(run, Phase.FAILED)
    app = show(project, "monitor", monkeypatch)
    assert "monitor_go_on" not in [button.key for button in app.button], "there is no checkpoint"
    save_checkpoint(run, 15)
    app = show(project, "monitor", monkeypatch)
    assert "15" in app.button(key="monitor_go_on").label
    app.button(key="monitor_go_on").click().run()
    assert not app.exception
    assert json.loads(run.attempt_file.read_text())["iteration"] == 15
    wait_for(run, Phase.FAILED)


def test_out_of_memory_offers_the_config(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('torch.OutOfMemoryError: CUDA out of memory.'); sys.exit(1)"
    run = start(project, "oom", code)
    wait_for(run, Phase.FAILED)
    app = show(project, "monitor", monkeypatch)
    assert "ran out of memory" in app.error[0].value
    assert "max_length" in texts(app)
    (project.config / "tiny.py").write_text("lr = 1\n", encoding="utf-8")
    went: list[str] = []
    monkeypatch.setattr("streamlit.switch_page", lambda page, **_options: went.append(page))
    app.button(key="monitor_fit").click().run()
    assert (went, app.session_state["launch_config"]) == (["pages/train/launch.py"], "tiny")


def test_an_early_end_is_said_with_the_best_checkpoint(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(project, "early", "pass")
    lines = [{"iteration": 0, "loss": 3.0}, {"iteration": 10, "loss": 1.25, "is_best": True}]
    lines += [{"iteration": 20, "loss": 1.5, "patience": 1, "ends": True}]
    run.validation_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    save_checkpoint(run, 10)
    wait_for(run, Phase.FINISHED)
    app = show(project, "monitor", monkeypatch)
    (said,) = [box.value for box in app.success]
    assert said.startswith("Ended early: by step 20")
    assert "step 10 (validation loss 1.2500)" in said
    assert any("Lowest validation loss 1.2500 (step 10), latest 1.5000" in caption.value for caption in app.caption)


def test_stopped_by_an_alert_is_said(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(project, "nan", "pass")
    wait_for(run, Phase.FINISHED)
    state = json.loads(run.state_file.read_text())
    stop = {"mode": "cancel", "requested_at": 1.0, "reason": "nan", "sent": "SIGTERM"}
    write_json(run.state_file, state | {"phase": "cancelled", "stop": stop, "gpu_bytes_left": 3 * 2**30})
    app = show(project, "monitor", monkeypatch)
    assert "NaN" in app.warning[0].value
    assert "3.0 GiB" in app.warning[1].value


def test_alert_settings_are_written_for_run_and_project(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(project, "one", "import time; time.sleep(86400)")
    app = show(project, "monitor", monkeypatch, monitor_view="alerts")
    app.text_input(key="monitor_webhook_one").input("no address").run()
    app.button(key="monitor_apply_rules").click().run()
    assert "no address" in app.error[0].value
    assert not run.watch_file.exists()
    app.text_input(key="monitor_webhook_one").input("https://example.com/hook").run()
    app.multiselect(key="monitor_stop_on_one").set_value(["nan", "stalled"]).run()
    app.checkbox(key="monitor_for_new_runs").check().run()
    app.button(key="monitor_apply_rules").click().run()
    assert not app.exception
    for file in (run.watch_file, project_rules_file(project.private)):
        rules = read_rules(file)
        assert (rules.stop_on, rules.webhook) == (("nan", "stalled"), "https://example.com/hook")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_runs_are_searched_by_name_tag_and_note(
    project: Project, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    first, second = start(project, "alpha", "pass"), start(project, "beta", "pass")
    for run in (first, second):
        wait_for(run, Phase.FINISHED)
    write_notes(second, Notes(("baseline",), "learning rate halved"))
    app = show(project, "runs", monkeypatch, language)
    assert len(app.dataframe[0].value) == 2
    app.text_input(key="runs_search").input("HALVED beta").run()
    assert app.dataframe[0].value["run"].tolist() == ["beta"]
    app.text_input(key="runs_search").input("nothing like that").run()
    assert not app.dataframe
    app.text_input(key="runs_search").input("").run()
    app.multiselect(key="runs_tags").set_value(["baseline"]).run()
    assert app.dataframe[0].value["run"].tolist() == ["beta"]
    assert app.dataframe[0].value["validation"].tolist() == [1.25]
    assert not app.exception


def test_chosen_runs_are_compared_noted_and_exported(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alpha", "beta"):
        wait_for(start(project, name, "pass"), Phase.FINISHED)
    monkeypatch.setattr("pages.ui.run_table.run_table", lambda rows: rows[:1])
    app = show(project, "runs", monkeypatch)
    name = "beta" if "runs_tags_beta" in [each.key for each in app.multiselect] else "alpha"
    app.text_area(key=f"runs_note_{name}").input("my note").run()
    app.button(key="runs_save_notes").click().run()
    assert read_notes(RunDirectory(project.train / name)).text == "my note"
    for kind in ("bundle", "events"):
        app.button(key=f"runs_make_{kind}").click().run()
        assert not app.exception
    assert {path.name for path in (project.private / "exports").iterdir()} == {
        f"{name}.zip",
        f"events.out.tfevents.{name}",
    }
    monkeypatch.setattr("pages.ui.run_table.run_table", lambda rows: rows)
    for axis in ("steps", "tokens", "minutes"):
        app = show(project, "runs", monkeypatch, runs_axis=axis)
        assert any("settings of these runs are the same" in caption.value for caption in app.caption)
