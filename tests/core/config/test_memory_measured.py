"""What a run took against its estimate, and the correction that follows from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config.memory.comparison import card_of, estimate_of, learn, measured_bytes
from core.config.memory.measured import Key, correction, remember
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.metrics import COLUMNS, Metrics
from core.runs.request import TrainRequest
from core.runs.train import plan
from tests.models import write_tiny_qwen2
from tests.training import make_project

KEY = Key("f00d", "NVIDIA H100", "qlora/amp")


def metrics(memory: list[float]) -> Metrics:
    rows = {name: np.full(len(memory), np.nan) for name in COLUMNS}
    return Metrics({**rows, "memory_bytes": np.array(memory), "iteration": np.arange(1.0, len(memory) + 1)})


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Project, RunDirectory]:
    """The files of a run on the second of two GPUs."""
    project, config = make_project(tmp_path / "p", write_tiny_qwen2)
    spec: RunSpec = plan(project, TrainRequest(config=config, gpus=("GPU-b",), name="run_a"))
    run = RunDirectory(project.train / spec.id)
    run.source.mkdir(parents=True)
    (run.source / "tiny.py").write_text(config.read_text())
    run.spec_file.write_text(json.dumps(spec.to_json()))
    gpus: list[dict[str, Any]] = [
        {"index": 0, "uuid": "GPU-a", "name": "Other", "memory_total_bytes": 1},
        {"index": 1, "uuid": "GPU-b", "name": "NVIDIA H100", "memory_total_bytes": 80 * 2**30},
    ]
    run.gpu_file.write_text(json.dumps({"at": 0, "gpus": gpus}) + "\n")
    return project, run


def test_a_run_teaches_the_next_estimate(finished: tuple[Project, RunDirectory]) -> None:
    project, run = finished
    estimate = estimate_of(run)
    assert estimate is not None
    assert estimate.card.name == "NVIDIA H100"
    assert estimate.key.card == "NVIDIA H100"
    expected = estimate.budget.allocated_bytes
    assert measured_bytes(estimate, metrics([expected] * 3)) is None  # two optimizer steps are four micro-steps here
    measured = measured_bytes(estimate, metrics([0.5 * expected, 1.1 * expected, float("nan"), expected]))
    assert measured == pytest.approx(1.1 * expected, abs=1)
    learn(project, run, estimate, int(1.1 * expected))
    assert correction(project, estimate.key) == pytest.approx(1.1, abs=1e-3)
    assert correction(project, KEY) == 1.0


def test_a_run_without_a_gpu_has_no_estimate(finished: tuple[Project, RunDirectory]) -> None:
    _, run = finished
    run.gpu_file.write_text('{"at": 0, "gpus": []}\n')
    assert card_of(run) is None
    assert estimate_of(run) is None
    run.gpu_file.unlink()
    assert estimate_of(run) is None


def test_a_run_made_by_hand_or_whose_model_is_gone(finished: tuple[Project, RunDirectory], tmp_path: Path) -> None:
    import shutil

    project, run = finished
    assert estimate_of(RunDirectory(tmp_path)) is None
    shutil.rmtree(project.model)
    assert estimate_of(run) is None


def test_the_median_of_the_last_runs_counts(project: Project) -> None:
    for number, ratio in enumerate((1.9, 1.9, 1.9, 1.0, 1.1, 1.2, 1.3, 1.4)):
        remember(project, KEY, run=f"run_{number}", estimated_bytes=1000, measured_bytes=round(1000 * ratio))
    assert correction(project, KEY) == 1.2
    remember(project, KEY, run="run_7", estimated_bytes=1000, measured_bytes=1150)
    assert correction(project, KEY) == 1.15


def test_what_is_out_of_proportion_teaches_nothing(project: Project) -> None:
    remember(project, KEY, run="other", estimated_bytes=1000, measured_bytes=9000)
    assert correction(project, KEY) == 1.0
    (project.private / "memory.json").write_text("not json")
    assert correction(project, KEY) == 1.0
    remember(project, KEY, run="mine", estimated_bytes=1000, measured_bytes=1500)
    assert correction(project, KEY) == 1.5
