"""From a request to run.json: what is checked before anything starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConflictError, DanluError
from core.project import Project
from core.runs.train import TrainRequest, plan
from tests.models import write_tiny_qwen2
from tests.training import ROWS, make_project


@pytest.fixture
def made(tmp_path: Path) -> tuple[Project, Path]:
    return make_project(tmp_path / "p", write_tiny_qwen2)


def code_of(project: Project, **request: Any) -> str:
    with pytest.raises(DanluError) as caught:
        plan(project, TrainRequest(**request))
    return caught.value.code


def test_the_plan_says_everything_needed_to_do_it_again(made: tuple[Project, Path]) -> None:
    project, config = made
    spec = plan(project, TrainRequest(config=config, name="first", seed=7))
    details = spec.details
    assert (spec.id, spec.kind, spec.title, spec.gpus) == ("first", "train", "tiny", [])
    assert details["config"]["name"] == "tiny"
    assert len(details["config"]["sha256"]) == len(details["data"][0]["sha256"]) == 64
    assert details["data"][0]["rows"] == ROWS
    assert details["base_model"]["model_type"] == "qwen2"
    assert details["base_model"]["fingerprint"]
    assert details["prompt_template"]["INSTRUCTION"].startswith("<|im_start|>user")
    assert (details["method"], details["max_length"], details["accumulative_counts"]) == ("lora", 64, 2)
    assert (details["seed"], details["world_size"], details["resume"]) == (7, 1, None)
    assert details["total_iterations"] > 0
    assert {"torch", "xtuner", "python"} <= set(details["versions"])
    assert not (project.train / "first").exists(), "a plan writes nothing"


def test_bad_paths_are_named_before_the_start(made: tuple[Project, Path]) -> None:
    project, config = made
    text = config.read_text()
    assert code_of(project, config=project.config / "none.py") == "files.missing"
    config.write_text(text + "\nlr = = 3\n")
    assert code_of(project, config=config) == "config.syntax"
    config.write_text(text)
    shutil.move(project.model / "tiny/model.safetensors", project.root)
    assert code_of(project, config=config) == "train.model_without_weights"
    (project.model / "tiny/config.json").unlink()
    assert code_of(project, config=config) == "train.model_without_config"
    shutil.rmtree(project.model / "tiny")
    assert code_of(project, config=config) == "train.model_missing"


def test_missing_data_is_named(made: tuple[Project, Path]) -> None:
    project, config = made
    (project.data / "rows.jsonl").unlink()
    assert code_of(project, config=config) == "train.data_missing"


def test_names_are_plain_and_free(made: tuple[Project, Path]) -> None:
    project, config = made
    assert code_of(project, config=config, name="../out") == "train.bad_name"
    (project.train / "taken").mkdir()
    with pytest.raises(ConflictError):
        plan(project, TrainRequest(config=config, name="taken"))


def test_deepspeed_and_checkpoint_must_fit(made: tuple[Project, Path]) -> None:
    project, config = made
    assert code_of(project, config=config, deepspeed="zero9") == "train.unknown_deepspeed"
    assert code_of(project, config=config, resume=project.train / "iter_1.pth") == "train.checkpoint_missing"
    cut = project.train / "iter_2.pth"
    cut.write_bytes(b"PK\x03\x04 cut off")
    assert code_of(project, config=config, resume=cut).startswith("checkpoints.")
