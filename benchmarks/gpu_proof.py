"""Proof that the pinned set trains on this GPU: one LoRA and one QLoRA run of 20 iterations through the launcher, exit code 0 each.

InternLM2-1.8B's shape, random weights. Runs what Danlu runs: torchrun → XTuner's own training program, checkpoint at the end.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.result import NoGpu, Result
from core.xtuner.command import free_port

ITERATIONS: Final = 20
_ROOT: Final = Path(__file__).parents[1]


def run() -> Result:
    """Raises NoGpu without a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpu("needs an NVIDIA GPU")
    figures: dict[str, float | int | str | None] = {"gpu": torch.cuda.get_device_name()}
    targets: dict[str, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in ("lora", "qlora"):
            for key, value in train(method, Path(folder) / method).items():
                figures[f"{method}_{key}"] = value
            targets[f"{method}_exit_code"] = ("==", 0)
            targets[f"{method}_iterations"] = ("==", ITERATIONS)
            targets[f"{method}_checkpoints"] = (">=", 1)
    return Result(figures, targets)


def train(method: str, work: Path) -> dict[str, Any]:
    """Train one method in `work`; the exit code, iterations logged, losses and checkpoints found."""
    import xtuner

    from benchmarks.training.case import Case, config_source, make_model_folder, saved_llm

    work.mkdir(parents=True)
    case = Case(side="stock", method=method, accumulation=2, warm_steps=ITERATIONS // 2, windows=0)
    folder = make_model_folder(case.shape, Path(tempfile.gettempdir()) / f"danlu_bench_{case.shape}")
    if method == "qlora":
        saved_llm(folder)
    config = work / "config.py"
    source = config_source(case, folder, work).replace(
        "default_hooks = dict(checkpoint=None, logger=None)",
        "from mmengine.hooks import CheckpointHook, LoggerHook\n"
        f"default_hooks = dict(checkpoint=dict(type=CheckpointHook, by_epoch=False, interval={ITERATIONS}), "
        "logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1))",
    )
    config.write_text(source)
    program = Path(xtuner.__file__).parent / "tools" / "train.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port()),
         str(program), str(config), "--work-dir", str(work), "--launcher", "pytorch", "--seed", "7"],
        cwd=_ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    if done.returncode != 0:
        print(done.stdout[-3000:], done.stderr[-5000:], file=sys.stderr)
    lines = [json.loads(line) for file in work.rglob("scalars.json") for line in file.read_text().splitlines()]
    return {
        "exit_code": done.returncode,
        "iterations": max((line["step"] for line in lines), default=0),
        "first_loss": lines[0]["loss"] if lines else None,
        "last_loss": lines[-1]["loss"] if lines else None,
        "peak_memory_mib": max((line.get("memory", 0) for line in lines), default=None),
        "checkpoints": len(list(work.glob("iter_*.pth"))),
    }
