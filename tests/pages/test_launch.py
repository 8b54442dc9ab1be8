"""The launch page: without a config, with one, with a config that cannot train, and at the start."""

from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from core.config import deepspeed
from core.config.source import ConfigSource
from core.files import write_json
from core.launchers import node, slurm
from core.messages import message
from core.project import open_project
from core.runs import train
from core.runs.directory import RunDirectory, RunSpec
from tests.core.runs.test_resume import write_run, write_zero_run
from tests.models import write_tiny_qwen2
from tests.training import make_project, validate_on

SCRIPT = str(Path(__file__).parents[2] / "pages/train/launch.py")


def open_page(root: Path, language: str = "en") -> AppTest:
    app = AppTest.from_file(SCRIPT, default_timeout=240)
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
    assert "core.xtuner.runtime.entry" in app.code[0].value
    assert not app.error
    assert not app.button(key="launch_start").disabled


def test_a_missing_model_is_an_error_with_a_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, config = make_project(tmp_path / "p", write_tiny_qwen2)
    config.write_text(config.read_text().replace("/tiny", "/gone"))
    app = show(project.root, monkeypatch)
    assert "There is no model folder" in app.error[0].value
    assert app.button(key="launch_start").disabled


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


def with_checkpoint(root: Path, **request: Any) -> Any:
    """A project whose one run of two processes has saved a plain checkpoint at iteration 8."""
    project, config = make_project(root, write_tiny_qwen2)
    write_run(project, config, **request)
    return project


def test_resuming_on_other_ranks_says_what_will_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    project = with_checkpoint(tmp_path / "p", cpu_processes=2)
    for run in project.train.iterdir():
        (run / "validation.jsonl").write_text('{"iteration": 8, "loss": 1.5, "is_best": true}\n')
        (run / "metrics.jsonl").write_text('{"iteration": 8, "total_iterations": 8, "loss": 1.25}\n')
    validate_on(project, project.config / "tiny.py")
    app = show(project.root, monkeypatch)
    app.toggle(key="launch_resume").set_value(True).run()
    assert not app.exception
    assert app.selectbox(key="launch_checkpoint").value.endswith("iter_8.pth")
    assert app.selectbox(key="launch_checkpoint").options[0].endswith("best · validation loss 1.5000")
    assert any("validated on held_out.jsonl, every 2 micro-steps" in caption.value for caption in app.caption)
    assert any("Written by 2 processes" in info.value and "iteration 8 becomes 16" in info.value for info in app.info)
    app.number_input(key="launch_processes").set_value(2).run()
    assert not any("Written by" in info.value for info in app.info)
    assert any("nothing left to do" in warning.value for warning in app.warning)
    assert any(text.value == "1.2500" for text in app.markdown)
    app.segmented_control(key="launch_way").set_value("longer").run()
    assert any("Planned for 1 epochs, now 2" in info.value for info in app.info)
    assert not any("nothing left to do" in warning.value for warning in app.warning)


def test_a_start_that_writes_a_checkpoint_first_shows_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = with_checkpoint(tmp_path / "p", cpu_processes=2)
    started: list[str] = []

    def start(_project: Any, function: str, **options: Any) -> Any:
        started.append(f"{function} {options['kind']}")
        return train.RunDirectory(project.jobs / "reshape_1")

    monkeypatch.setattr(train, "start_job", start)
    app = show(project.root, monkeypatch)
    app.toggle(key="launch_resume").set_value(True).run()
    app.button(key="launch_start").click().run()
    assert not app.exception
    assert started == ["core.runs.carry_over:carry_over reshape"]
    assert app.session_state["launch_reshape"] == "reshape_1"


def test_another_lora_shape_is_refused_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = with_checkpoint(tmp_path / "p")
    config = project.config / "tiny.py"
    config.write_text(ConfigSource(config.read_text()).set("model.lora.r", 8).text)
    app = show(project.root, monkeypatch)
    app.toggle(key="launch_resume").set_value(True).run()
    assert "lora.r: 64 → 8" in app.error[0].value
    assert app.button(key="launch_start").disabled


def test_a_cluster_shows_its_batch_file_and_an_edit_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = make_project(tmp_path / "p", write_tiny_qwen2)
    monkeypatch.setattr(slurm, "is_available", lambda: True)
    monkeypatch.setattr(slurm, "partitions", lambda: ["gpu", "long"])
    launched: list[Any] = []

    def launch(_parent: Path, spec: Any) -> Any:
        launched.append(spec)
        return train.RunDirectory(project.train / spec.id)

    monkeypatch.setattr(train, "launch", launch)
    monkeypatch.setattr("streamlit.switch_page", lambda *_args, **_options: None)
    st.cache_data.clear()
    app = show(project.root, monkeypatch)
    app.segmented_control(key="launch_where").set_value("cluster").run()
    app.text_input(key="launch_name").input("mine").run()
    app.number_input(key="launch_nodes").set_value(2).run()
    assert not app.exception
    text = app.text_area(key="launch_batch_text").value
    assert "#SBATCH --partition=gpu\n" in text
    assert "#SBATCH --nodes=2\n" in text
    app.text_area(key="launch_batch_text").set_value(f"{text}\n# mine").run()
    assert any("was edited" in caption.value for caption in app.caption)
    app.button(key="launch_start").click().run()
    assert not app.exception
    assert (project.train / "mine/job.sbatch").read_text().endswith("# mine")
    assert (launched[0].details["launcher"], launched[0].details["world_size"], launched[0].gpus) == ("slurm", 2, [])
    st.cache_data.clear()


def test_several_machines_start_the_first_and_show_the_command_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = make_project(tmp_path / "p", write_tiny_qwen2)
    launched: list[Any] = []
    monkeypatch.setattr(
        train, "launch", lambda _parent, spec: launched.append(spec) or train.RunDirectory(project.train / spec.id)
    )
    monkeypatch.setattr("streamlit.switch_page", lambda *_args, **_options: None)
    app = show(project.root, monkeypatch)
    app.segmented_control(key="launch_where").set_value("nodes_by_hand").run()
    app.text_input(key="launch_address").input("a b").run()
    assert "no address of a machine" in app.error[0].value
    app.text_input(key="launch_address").input("10.0.0.1").run()
    app.button(key="launch_start").click().run()
    assert not app.exception
    spec = launched[0]
    assert (spec.details["launcher"], spec.details["world_size"]) == ("nodes", 2)
    assert spec.argv[-4:-2] == ["-m", "core.launchers.node"]


def test_the_monitor_shows_nodes_and_what_to_paste(tmp_path: Path) -> None:
    def page(folder: str) -> None:
        from pathlib import Path

        from core.runs.directory import RunDirectory
        from core.runs.state import Phase, RunStatus
        from pages.ui.run_cluster import cluster_note

        cluster_note(RunDirectory(Path(folder)), RunStatus(Phase.RUNNING))

    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    spec = RunSpec(
        id="run", kind="train", title="x", argv=["/py"], cwd="/p", created_at="", details={"nodes": {"nodes": 2}}
    )
    write_json(run.spec_file, spec.to_json())
    node.report(run, 0, "joining")
    app = AppTest.from_function(page, args=(str(run.path),))
    app.session_state["language"] = "en"
    app.run()
    assert not app.exception
    assert "Machine 1: not there yet" in app.caption[0].value
    assert app.code[0].value.endswith(f"/py -m core.launchers.node {run.path} 1")
    write_json(
        run.path / slurm.JOB_FILE,
        {"id": "7", "state": "PENDING", "is_pending": True, "position": 3, "reason": "Priority"},
    )
    app.run()
    assert "Slurm job 7 · waiting · place 3 in the queue · others come first" in app.caption[0].value


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_bar_counts_what_the_checks_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str) -> None:
    project, config = make_project(tmp_path / "p", write_tiny_qwen2)
    config.write_text(ConfigSource(config.read_text()).set("lr", 1.0).text + "\nround = 1\n")
    app = show(project.root, monkeypatch, language)
    bar = next(markdown.value for markdown in app.markdown if "red-badge" in markdown.value)
    words = ("1 error]", "1 warning]") if language == "en" else ("1 处错误]", "1 处警告]")
    assert all(word in bar for word in words)
    assert "GiB" in bar
    assert "round" in app.error[0].value
    assert app.button(key="launch_start").disabled


def test_a_deepspeed_json_is_edited_saved_under_a_name_and_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = make_project(tmp_path / "p", write_tiny_qwen2)
    launched: list[Any] = []
    monkeypatch.setattr(
        train, "launch", lambda _parent, spec: launched.append(spec) or train.RunDirectory(project.train / spec.id)
    )
    monkeypatch.setattr("streamlit.switch_page", lambda *_args, **_options: None)
    app = show(project.root, monkeypatch)
    app.selectbox(key="launch_deepspeed_new").set_value("deepspeed_zero2").run()
    assert not app.button(key="launch_start").disabled
    stock = editor(app).value
    assert '"stage": 2' in stock

    editor(app).set_value(stock.replace("overlap_comm", "overlap_com")).run()
    assert app.button(key="launch_start").disabled, "an edit that is not saved is not started unseen"
    assert any("line 9, column 5" in m.value and "Did you mean `overlap_comm`" in m.value for m in app.markdown)
    editor(app).set_value(stock[:-4]).run()
    assert any("no valid JSON" in error.value for error in app.error)

    mine = stock.replace('"stage": 2', '"stage": 1')
    editor(app).set_value(mine).run()
    app.text_input(key="launch_zero_name").set_value("deepspeed_zero1").run()
    app.button(key="launch_zero_save_as").click().run()
    assert any("XTuner's own" in error.value for error in app.error)
    app.text_input(key="launch_zero_name").set_value("mine").run()
    app.button(key="launch_zero_save_as").click().run()
    assert not app.exception
    assert app.selectbox(key="launch_deepspeed_new").value == "mine"
    assert editor(app).value == mine
    kept = project.config / "deepspeed/mine.json"
    editor(app).set_value(f"{mine}\n").run()
    app.button(key="launch_zero_discard").click().run()
    assert (editor(app).value, kept.read_text()) == (mine, mine)
    mine = mine.replace('"overlap_comm": true', '"overlap_comm": false')
    editor(app).set_value(mine).run()
    app.button(key="launch_zero_save").click().run()
    assert (editor(app).value, kept.read_text()) == (mine, mine)
    app.button(key="launch_start").click().run()
    assert (launched[0].details["deepspeed"], launched[0].details["deepspeed_config"]["text"]) == (
        "deepspeed_zero1",
        mine,
    )
    app.button(key="launch_zero_remove").click().run()
    assert app.selectbox(key="launch_deepspeed_new").value == "deepspeed_zero1"
    assert not kept.exists()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_going_on_takes_the_deepspeed_json_that_the_run_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    # AppTest calls format functions outside of the session, where only the browser's language is known.
    monkeypatch.setattr("pages.ui.text.guess_language", lambda _locale: language)
    project, config = make_project(tmp_path / "p", write_tiny_qwen2)
    text = deepspeed.xtuner_text("deepspeed_zero2").replace('"overlap_comm": true', '"overlap_comm": false')
    kept = deepspeed.save(project, "mine", text)
    plain = write_run(project, config, cpu_processes=2)
    folder = write_zero_run(project, config, plain, deepspeed="mine")
    app = show(project.root, monkeypatch, language)
    app.toggle(key="launch_resume").set_value(True).run()
    key = f"launch_deepspeed_{folder}"
    assert app.selectbox(key=key).value == "mine"
    said = [caption.value for caption in app.caption if "`mine`" in caption.value]
    assert len(said) == 2, "beside the checkpoint and beside the box"
    deepspeed.save(project, "mine", f"{text}\n", before=text)
    app = show(project.root, monkeypatch, language)
    app.toggle(key="launch_resume").set_value(True).run()
    assert app.selectbox(key=key).value == "zero/source/deepspeed.json"
    assert app.selectbox(key=key).options[-1] == {"en": "copy kept by run zero", "zh": "训练 zero 自己的副本"}[language]
    assert editor(app).value == text
    assert not {"launch_zero_remove", "launch_zero_save", "launch_zero_discard"} & {button.key for button in app.button}
    assert not app.button(key="launch_start").disabled, "a copy that is not changed starts as it is"
    app.text_input(key="launch_zero_name").set_value("other").run()
    app.button(key="launch_zero_save_as").click().run()
    assert not app.exception
    assert app.selectbox(key=key).value == "other"
    assert (project.config / "deepspeed/other.json").read_text() == text
    assert kept.read_text() == f"{text}\n"


def editor(app: AppTest) -> Any:
    return next(area for area in app.text_area if str(area.key).startswith("launch_zero_json_"))


@pytest.mark.parametrize(("language", "words"), [("en", "pass 2: 5 of 22 rows"), ("zh", "第 2 遍：5 / 22 行")])
def test_the_monitor_says_how_far_tokenising_is(tmp_path: Path, language: str, words: str) -> None:
    def page(folder: str) -> None:
        from pathlib import Path

        import streamlit as st

        from core.runs.directory import RunDirectory
        from pages.ui.run_tokenising import tokenising_note

        st.text(tokenising_note(RunDirectory(Path(folder))))

    run = RunDirectory(tmp_path)
    app = AppTest.from_function(page, args=(str(run.path),))
    app.session_state["language"] = language
    assert app.run().text[0].value == "False"
    write_json(run.progress_file, {"done": 5, "total": 22, "message": message("monitor.tokenising", step=2).to_json()})
    app.run()
    assert not app.exception
    assert app.text[0].value == "True"
    assert words in app.get("progress")[0].proto.text
