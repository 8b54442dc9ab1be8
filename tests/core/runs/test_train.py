"""From a request to run.json: what is checked before anything starts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.config import deepspeed
from core.config.source import ConfigSource
from core.errors import ConflictError, DanluError
from core.files import write_json
from core.project import Project
from core.runs import start, train
from core.runs.compare import differences
from core.runs.directory import RunDirectory, RunSpec
from core.runs.request import TrainRequest
from core.runs.train import plan, start_training
from tests.models import write_tiny_qwen2
from tests.training import ROWS, make_project, validate_on


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
    assert details["validation"] is None
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


def test_what_it_validates_on_is_part_of_the_plan(made: tuple[Project, Path]) -> None:
    project, config = made
    file = validate_on(project, config, early_stop_patience=3)
    validation = plan(project, TrainRequest(config=config)).details["validation"]
    assert (validation["files"][0]["path"], validation["files"][0]["rows"]) == (str(file), 7)
    assert (validation["patience"], validation["save_best"]) == (3, True)
    file.unlink()
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


def test_an_own_deepspeed_json_goes_with_the_run(made: tuple[Project, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    project, config = made
    text = '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "bf16": {"enabled": "auto"}}'
    deepspeed.save(project, "mine", text)
    monkeypatch.setattr(train, "launch", lambda parent, spec: write_spec(RunDirectory(parent / spec.id), spec))
    own = start_training(project, TrainRequest(config=config, deepspeed="mine", name="own"))
    details = own.spec().details
    assert (details["deepspeed"], details["deepspeed_config"]["name"]) == ("deepspeed_zero1", "mine")
    assert (own.source / "deepspeed.json").read_text() == details["deepspeed_config"]["text"] == text
    stock = start_training(project, TrainRequest(config=config, deepspeed="deepspeed_zero2", name="stock"))
    found = {each.name: each.values for each in differences([own, stock])}
    assert found["DeepSpeed zero_optimization.stage"] == ("1", "2")
    assert found["DeepSpeed zero_optimization.reduce_bucket_size"] == ("1000", None)
    assert "DeepSpeed bf16.enabled" not in found
    without = start_training(project, TrainRequest(config=config, name="without"))
    assert without.spec().details["deepspeed_config"] is None
    assert not (without.source / "deepspeed.json").exists()


def write_spec(run: RunDirectory, spec: RunSpec) -> RunDirectory:
    write_json(run.spec_file, spec.to_json())
    return run


def test_a_deepspeed_json_that_would_lose_gradients_does_not_start(
    made: tuple[Project, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, config = made
    config.write_text(ConfigSource(config.read_text()).set("accumulative_counts", 4).text)
    machine = replace(start.read_machine(project), deepspeed_version="0.16.2")
    monkeypatch.setattr(start, "read_machine", lambda _project: machine)
    assert code_of(project, config=config, deepspeed="deepspeed_zero2_offload") == "deepspeed.drops_batches"
    plan(project, TrainRequest(config=config, deepspeed="deepspeed_zero2"))
    deepspeed.save(project, "mine", '{"zero_optimization": {"stage": 5}}')
    assert code_of(project, config=config, deepspeed="mine") == "deepspeed.has_errors"
    (project.config / "deepspeed/mine.json").write_text("{")
    assert code_of(project, config=config, deepspeed="mine") == "deepspeed.broken_json"
