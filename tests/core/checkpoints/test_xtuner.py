"""Delivery of checkpoints that XTuner made, against XTuner's own converters, which build the whole model."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints.adapter import export_adapter
from core.checkpoints.deliverables import deliver, list_deliverables
from core.checkpoints.full import export_full
from core.checkpoints.inspect import inspect_checkpoint, list_checkpoints
from core.checkpoints.shards import read_shard
from core.checkpoints.tensors import widen
from core.errors import ConflictError
from core.project import Project
from core.runs.job import SilentProgress
from core.runs.request import TrainRequest
from tests.core.checkpoints.adapters import read_model
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2
from tests.training import Trained, make_project, train

pytestmark = pytest.mark.engine
ORACLE = Path(__file__).parent / "xtuner_oracle.py"
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama, rsLoRA, head saved whole": (
        write_tiny_llama,
        "lora",
        dict(model__lora__use_rslora=True, model__lora__modules_to_save=["lm_head"]),
    ),
    "qwen2, DoRA, patterns": (
        write_tiny_qwen2,
        "lora",
        dict(model__lora__use_dora=True, model__lora__rank_pattern={"q_proj": 2}, model__lora__alpha_pattern={"v_proj": 4}),
    ),
    "qwen2 with biases": (write_tiny_qwen2, "lora", dict(model__lora__bias="all")),
    "internlm2": (write_tiny_internlm2, "lora", {}),
    "llama, all weights": (write_tiny_llama, "full", {}),
    "qwen2, all weights, tied": (write_tiny_qwen2, "full", {}),
    "internlm2, all weights": (write_tiny_internlm2, "full", {}),
}  # fmt: skip


@dataclass
class Case:
    """A checkpoint and what XTuner makes of it."""

    base: Path
    checkpoint: Path
    half: Path
    """Converted as XTuner does by default: float16."""
    single: Path
    """Converted with --fp32."""
    merged: Path
    """XTuner's merge of `half` (in float16)."""
    is_adapter: bool


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path, Trained]:
    """A real LoRA run of InternLM2 (remote code)."""
    project, config = make_project(tmp_path_factory.mktemp("trained") / "p", write_tiny_internlm2)
    return project, config, train(project, TrainRequest(config=config, name="run"))


@pytest.fixture(scope="module")
def trained_zero(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path, Trained]:
    """A real full fine-tune of a tied Qwen2 by two ranks under ZeRO-3."""
    project, config = make_project(tmp_path_factory.mktemp("zero") / "p", write_tiny_qwen2, method="full")
    request = TrainRequest(config=config, name="run", deepspeed="deepspeed_zero3", cpu_processes=2)
    return project, config, train(project, request)


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Project, Path, Trained],
    trained_zero: tuple[Project, Path, Trained],
) -> dict[str, Case]:
    """Every case, done by one process of XTuner."""
    folder = tmp_path_factory.mktemp("xtuner")
    jobs: list[dict[str, Any]] = []
    found: dict[str, Case] = {}

    def add(name: str, base: Path, config: Path, checkpoint: Path, *, is_adapter: bool) -> None:
        out = folder / f"out_{len(found)}"
        case = Case(base, checkpoint, out / "half", out / "single", out / "merged", is_adapter)
        source = {"do": "convert", "config": str(config), "checkpoint": str(checkpoint)}
        jobs.append({**source, "target": str(case.half), "fp32": False})
        jobs.append({**source, "target": str(case.single), "fp32": True})
        if is_adapter:
            jobs.append({"do": "merge", "base": str(base), "adapter": str(case.half), "target": str(case.merged)})
        found[name] = case

    for number, (name, (writer, method, edits)) in enumerate(CASES.items()):
        project, config = make_project(folder / f"p{number}", writer, method=method, **edits)
        checkpoint = project.train / "run" / "iter_4.pth"
        jobs.append({"do": "build", "config": str(config), "checkpoint": str(checkpoint)})
        add(name, project.model / "tiny", config, checkpoint, is_adapter=method == "lora")
    project, config, run = trained
    assert run.status.exit_code == 0, run.log[-3000:]
    add("trained", project.model / "tiny", config, list_checkpoints(run.run.path)[0].path, is_adapter=True)
    project, config, run = trained_zero
    assert run.status.exit_code == 0, run.log[-3000:]
    add("trained, ZeRO-3", project.model / "tiny", config, list_checkpoints(run.run.path)[0].path, is_adapter=False)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ORACLE), str(folder / "jobs.json")],
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def adapter_bits(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    tensors = read_shard(folder / "adapter_model.safetensors").tensors
    return {name: (tensor.dtype, tensor.read()) for name, tensor in tensors.items()}


def same_bits(found: dict[str, tuple[str, np.ndarray]], expected: dict[str, tuple[str, np.ndarray]]) -> None:
    assert found.keys() == expected.keys()
    for name, (dtype, bits) in found.items():
        assert dtype == expected[name][0], name
        assert np.array_equal(bits, expected[name][1]), name


ADAPTERS = [*(name for name, case in CASES.items() if case[1] == "lora"), "trained"]
WHOLE = [*(name for name, case in CASES.items() if case[1] == "full"), "trained, ZeRO-3"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_has_xtuner_s_bytes(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases[name]
    for dtype, theirs in (("F32", case.single), ("F16", case.half)):
        target = tmp_path / dtype
        export_adapter(str(case.checkpoint), str(target), dtype=dtype, progress=SilentProgress())
        same_bits(adapter_bits(target), adapter_bits(theirs))
    ours = json.loads((tmp_path / "F32/adapter_config.json").read_text())
    theirs_config = json.loads((case.single / "adapter_config.json").read_text())
    assert set(ours["target_modules"]) == set(theirs_config["target_modules"])
    assert {key: ours[key] for key in ours if key not in ("target_modules", "auto_mapping")} == {
        key: theirs_config[key] for key in ours if key not in ("target_modules", "auto_mapping")
    }


@pytest.mark.parametrize("name", WHOLE)
def test_whole_model_has_xtuner_s_bytes(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases[name]
    card = inspect_checkpoint(case.checkpoint)
    for dtype, theirs in (("F32", case.single), ("F16", case.half)):
        if card.is_folder and dtype == "F32":
            continue  # XTuner reads a DeepSpeed folder in float16 even with --fp32
        target = tmp_path / dtype
        export_full(str(case.checkpoint), str(target), dtype=dtype, shard_bytes=100_000, progress=SilentProgress())
        found, expected = read_model(target), read_model(theirs)
        assert len(list(target.glob("*.safetensors"))) > 1
        if "tied" in name or card.is_folder:
            expected.pop("lm_head.weight", None)
        same_bits(found, expected)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_model_loads_and_answers(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    import torch

    from tests.core.checkpoints.adapters import load

    case = cases[name]
    export_full(str(case.checkpoint), str(tmp_path / "ours"), dtype="F16", progress=SilentProgress())
    ids = torch.arange(5, 40)[None]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (load(folder)(input_ids=ids).logits for folder in (tmp_path / "ours", case.half))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_model_is_xtuner_s_within_its_own_rounding(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """XTuner casts base and adapter to float16 and forms the update in it; ours rounds once, to the base's type."""
    from core.checkpoints.merge import merge_adapter

    case = cases[name]
    export_adapter(str(case.checkpoint), str(tmp_path / "adapter"), progress=SilentProgress())
    merge_adapter(str(case.base), [str(tmp_path / "adapter")], str(tmp_path / "merged"), progress=SilentProgress())
    found, expected = read_model(tmp_path / "merged"), read_model(case.merged)
    assert found.keys() == expected.keys()
    for key, (dtype, bits) in found.items():
        values, theirs = widen(bits, dtype), widen(*reversed(expected[key]))
        assert np.abs(values - theirs).max() <= 4 * 2**-11 * np.abs(values).max(), key


def test_zero_folder_keeps_more_than_xtuner_does(trained_zero: tuple[Project, Path, Trained], tmp_path: Path) -> None:
    """XTuner casts it to float16 whatever is asked; the optimizer's float32 copies are all there."""
    checkpoint = list_checkpoints(trained_zero[2].run.path)[0].path
    export_full(str(checkpoint), str(tmp_path / "F32"), dtype="F32", progress=SilentProgress())
    found = {name: widen(bits, dtype) for name, (dtype, bits) in read_model(tmp_path / "F32").items()}
    assert any(not np.array_equal(value, value.astype(np.float16).astype(np.float32)) for value in found.values())


def test_from_checkpoint_to_verified_model_in_one_job(trained: tuple[Project, Path, Trained]) -> None:
    project, _, run = trained
    checkpoint = list_checkpoints(run.run.path)[0]
    result = deliver(str(project.root), str(checkpoint.path), checkpoint.name, progress=SilentProgress())
    assert result["verified"]["passed"]
    assert result["verified"]["method"] == "logits"
    made = {item.path.parent.name: item for item in list_deliverables(project)}
    assert made["final_model"].is_verified
    assert made["final_model"].run == made["huggingface"].run == "run"
    assert made["final_model"].checkpoint == checkpoint.name
    card = (made["final_model"].path / "README.md").read_text()
    assert f"{result['verified']['logit_error']:.2g}" in card
    tokenizer = json.loads((made["final_model"].path / "tokenizer_config.json").read_text())
    assert "ns.round" in tokenizer["chat_template"]
    with pytest.raises(ConflictError):
        deliver(str(project.root), str(checkpoint.path), checkpoint.name, progress=SilentProgress())
