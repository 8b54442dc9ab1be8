"""XTuner's own runner, stock and with the speed layer, on the same weights and data in fp32: the same losses, step by step."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training.case import Case, make_model_folder, run_xtuner

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
EVERY_SEEING = ["fast_pass", "grouped_micro_batches", "selective_recomputation", "fused_optimizer"]
"""The parts that leave the arithmetic as stock XTuner does it: packed samples see each other."""
SETTINGS: dict[str, Any] = {
    "shape": "tiny", "length": 64, "batch": 2, "accumulation": 4, "windows": 4, "dropout": 0.0, "learning_rate": 5e-2,
    "keeps_losses": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder("tiny", tmp_path_factory.mktemp("tiny"))


def losses(folder: Path, work: Path, **changes: Any) -> tuple[list[float], dict[str, Any]]:
    work.mkdir()
    result = run_xtuner(Case(**{**SETTINGS, **changes}), folder, work)
    return result["losses"], {report["name"]: report for report in result["parts"]}


@pytest.fixture(scope="module")
def stock(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    found, reports = losses(folder, tmp_path_factory.mktemp("stock") / "run", side="stock")
    assert reports == {}
    return found


def test_losses_equal_stock_step_by_step(folder: Path, tmp_path: Path, stock: list[float]) -> None:
    """Two micro-batches at once, nothing computed again, another loss function: rounding apart, the same training."""
    assert abs(stock[-1] - stock[0]) > 0.02, "the weights move, so equal losses say that they moved alike"
    found, reports = losses(folder, tmp_path / "run", side="fast", parts=EVERY_SEEING, tokens_per_pass=256)
    assert found == pytest.approx(stock, abs=1e-3)
    assert {name for name, report in reports.items() if report["applied"]} == set(EVERY_SEEING) - {"fused_optimizer"}
    assert reports["block_attention"]["note"] == "not asked for"
    assert "2 micro-batches" in reports["grouped_micro_batches"]["note"]


def test_samples_apart_by_default(folder: Path, tmp_path: Path, stock: list[float]) -> None:
    """Every part: the losses are those of separate samples, so they differ from stock; grouping changes nothing about it."""
    one, reports = losses(folder, tmp_path / "one", side="fast")
    all_at_once, _ = losses(folder, tmp_path / "all", side="fast", tokens_per_pass=512)
    assert one == pytest.approx(all_at_once, abs=1e-3)
    assert reports["block_attention"]["applied"]
    assert max(abs(a - b) for a, b in zip(one, stock, strict=True)) > 3e-3


def test_what_it_cannot_take_trains_as_stock_does(
    folder: Path, tmp_path: Path, stock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packer's bounds are asked for before the model is known: a model that is left alone must get plain batches."""
    from core.xtuner.runtime.speed import anatomy

    monkeypatch.setattr(anatomy, "_INTERNLM2", "SomethingElse")
    left, reports = losses(folder, tmp_path / "left", side="fast")
    assert left == stock
    assert not any(report["applied"] for report in reports.values())
    assert reports["fast_pass"]["note"] == "architecture InternLM2ForCausalLM is not known to the fast pass"
    first = json.loads((tmp_path / "left" / "speed.json").read_text())[0]
    assert first["note"] == {"key": "speed.left.architecture", "params": {"name": "InternLM2ForCausalLM"}}


def test_a_defect_of_the_layer_does_not_end_the_run(
    folder: Path, tmp_path: Path, stock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.xtuner.runtime.speed import apply as room

    def broken(*_arguments: Any) -> None:
        raise KeyError("something nobody thought of")

    monkeypatch.setattr(room, "_plan", broken)
    left, reports = losses(folder, tmp_path / "left", side="fast")
    assert left == stock
    assert "something nobody thought of" in reports["fast_pass"]["note"]
