"""What counts as a step done: what lies on the disk, however it came there."""

import sys
from pathlib import Path

import pytest

from core.environment.doctor import report_file
from core.environment.report import Line, Report, Status
from core.files import write_json, write_text
from core.journey import STEPS, StepState, next_step, steps
from core.messages import message
from core.project import Project, open_project
from core.runs.launch import now_utc


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return open_project(tmp_path)


def done(project: Project) -> set[str]:
    return {name for name, state in steps(project).items() if state is StepState.DONE}


def test_without_a_project_there_are_no_steps() -> None:
    assert steps(None) == {}


def test_an_empty_project_has_nothing_done(project: Project) -> None:
    assert set(steps(project).values()) == {StepState.OPEN}


@pytest.mark.parametrize(("status", "is_done"), [(Status.GREEN, True), (Status.AMBER, True), (Status.RED, False)])
def test_an_environment_that_cannot_train_is_not_done(project: Project, status: Status, is_done: bool) -> None:
    line = Line("packages", "torch", status, message("environment.package.ok", version="2.6.0"))
    write_json(report_file(project.root), Report(sys.executable, now_utc(), (line,)).to_json())
    assert ("environment" in done(project)) is is_done


@pytest.mark.parametrize("folder", [".", "internlm2"])
@pytest.mark.parametrize(("step", "place"), [("model", "model"), ("export", "final_model")])
def test_a_model_may_lie_in_the_folder_or_below_it(project: Project, step: str, place: str, folder: str) -> None:
    write_text(project.root / place / folder / "config.json", "{}")
    assert done(project) == {step}


def test_a_half_made_model_counts_for_nothing(project: Project) -> None:
    write_text(project.final_model / ".iter_8.partial" / "config.json", "{}")
    assert done(project) == set()


@pytest.mark.parametrize("name", ["a.json", "sub/b.jsonl", "c.CSV", "d.parquet"])
def test_every_format_is_data(project: Project, name: str) -> None:
    write_text(project.data / name, "")
    assert done(project) == {"dataset"}


def test_a_note_is_no_data(project: Project) -> None:
    write_text(project.data / "README.md", "")
    write_text(project.data / ".hidden.json", "")
    assert done(project) == set()


def test_a_config_is_a_python_file(project: Project) -> None:
    write_text(project.config / "mine.py", "")
    assert done(project) == {"config"}


def test_a_run_made_by_hand_with_xtuner_counts(project: Project) -> None:
    write_text(project.root / "train_deepspeed/20240101_000000/vis_data/scalars.json", '{"loss": 1.0, "step": 1}\n')
    assert "launch" in done(project)


def test_the_next_step_is_the_first_that_is_not_done() -> None:
    states = dict.fromkeys(STEPS, StepState.DONE)
    assert next_step(states) is None
    assert next_step({}) == STEPS[0]
    assert next_step(states | {"monitor": StepState.ACTIVE, "chat": StepState.OPEN}) == "monitor"
