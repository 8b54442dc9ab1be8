"""Time and cost: from earlier runs on the same card, else a stated guess, else nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from core.config.checks import Surroundings, gather
from core.config.duration import Duration, estimate_duration, rate, set_rate
from core.config.facts import Machine
from core.config.findings import Context
from core.config.source import ConfigSource
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.jobs import look_at_runs
from core.runs.request import TrainRequest
from core.runs.train import plan
from tests.models import write_tiny_qwen2
from tests.training import make_project

CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Project, ConfigSource, Path]:
    project, config = make_project(tmp_path / "p", write_tiny_qwen2)
    return project, ConfigSource(config.read_text()), config


def context(source: ConfigSource) -> Context:
    return gather(source, Surroundings(machine=Machine(gpu_count=1)))


def earlier_run(project: Project, config: Path, name: str, *, card: str = CARD, seconds: float = 0.5) -> None:
    spec = plan(project, TrainRequest(config=config, gpus=("GPU-a",), name=name))
    run = RunDirectory(project.train / name)
    run.path.mkdir(parents=True)
    run.spec_file.write_text(json.dumps(spec.to_json()))
    gpu = {"index": 0, "uuid": "GPU-a", "name": card, "memory_total_bytes": 80 * 2**30}
    run.gpu_file.write_text(json.dumps({"at": 0, "gpus": [gpu]}) + "\n")
    lines = []
    for number in range(1, 21):
        # The first steps are slow: kernels are compiled and caches filled.
        took = 30.0 if number <= 4 else seconds
        line: dict[str, Any] = {"iteration": number, "loss": 1.0, "tokens": 64, "step_seconds": took, "at": time.time()}
        lines.append(json.dumps(line) + "\n")
    run.metrics_file.write_text("".join(lines))


def test_from_earlier_runs_on_this_card(trained: tuple[Project, ConfigSource, Path]) -> None:
    project, source, config = trained
    earlier_run(project, config, "one", seconds=0.5)
    earlier_run(project, config, "two", seconds=0.5)
    earlier_run(project, config, "elsewhere", card="Tesla T4", seconds=9.0)
    found = estimate_duration(look_at_runs(project), source, context(source), card=CARD, is_fast=True)
    assert found is not None
    assert (found.basis, set(found.runs)) == ("runs", {"one", "two"})
    assert found.tokens_per_update == 64 * 2
    assert found.seconds is not None
    assert found.seconds == pytest.approx([count * 0.5 for count in found.iterations])
    assert found.updates == tuple(max(1, count // 2) for count in found.iterations)


def test_another_method_is_no_measure(trained: tuple[Project, ConfigSource, Path]) -> None:
    from core.config.edits import set_method

    project, source, config = trained
    earlier_run(project, config, "lora")
    full = set_method(source, "full")
    found = estimate_duration(look_at_runs(project), full, context(full), card=CARD, is_fast=False)
    assert found is not None
    assert found.basis == "guess"


def test_a_guess_says_so_and_follows_the_arithmetic(trained: tuple[Project, ConfigSource, Path]) -> None:
    project, source, _ = trained
    stock = estimate_duration(look_at_runs(project), source, context(source), card=CARD, is_fast=False)
    fast = estimate_duration(look_at_runs(project), source, context(source), card=CARD, is_fast=True)
    old = estimate_duration(look_at_runs(project), source, context(source), card="Tesla T4", is_fast=False)
    assert stock is not None
    assert fast is not None
    assert old is not None
    assert stock.seconds and fast.seconds and old.seconds  # noqa: PT018 - for the type checker
    assert stock.basis == "guess"
    assert fast.seconds[0] < stock.seconds[0] < stock.seconds[1]
    assert old.seconds[0] / stock.seconds[0] == pytest.approx(989.4 / 65, rel=1e-6)
    unknown = estimate_duration(look_at_runs(project), source, context(source), card=None, is_fast=False)
    assert unknown is not None
    assert (unknown.basis, unknown.seconds) == ("unknown", None)


def test_without_data_nothing_is_known(trained: tuple[Project, ConfigSource, Path]) -> None:
    project, source, _ = trained
    gone = source.set("data_files", ["/gone.jsonl"])
    assert estimate_duration(look_at_runs(project), gone, context(gone), card=CARD, is_fast=False) is None


def test_the_price_is_for_every_card(project: Project) -> None:
    two_hours = Duration((10, 10), (5, 5), 64, (3600.0, 7200.0), "guess")
    assert two_hours.cost(2.5, 4) == (10.0, 20.0)
    assert Duration((10, 10), (5, 5), 64, None, "unknown").cost(2.5, 4) is None
    assert rate(project, CARD) == 0.0
    set_rate(project, CARD, 2.5)
    set_rate(project, "Tesla T4", 0.4)
    assert (rate(project, CARD), rate(project, "Tesla T4")) == (2.5, 0.4)
    (project.private / "prices.json").write_text('{"NVIDIA H100 80GB HBM3": "many"}')
    assert rate(project, CARD) == 0.0
