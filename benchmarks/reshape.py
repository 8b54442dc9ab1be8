"""Reshaping a ZeRO checkpoint against copying it and against DeepSpeed's universal conversion, in time and memory.

2 ranks → 4 → 2 on a synthetic ZeRO-2 checkpoint. All in turn, three times, the quickest of each: what else the machine does then weighs
on all alike. The universal conversion (`deepspeed.checkpoint.ds_to_universal`) compares nothing and its result is cut only when loaded.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result import Result

_LAYERS, _WIDTH = 24, 2048
_RANKS = 2
_ROUNDS = 3


def run() -> Result:
    with tempfile.TemporaryDirectory(dir=Path.home()) as home:
        source = Path(home) / "source" / "iter_500.pth"
        _in_child("write", str(source))
        size_bytes = sum(file.stat().st_size for file in source.iterdir())
        rounds = [_round(source, Path(home)) for _ in range(_ROUNDS)]
    copy_seconds = min(done.copy_seconds for done in rounds)
    ways = [done.wide for done in rounds], [done.back for done in rounds]
    seconds = max(min(one["seconds"] for one in way) for way in ways)
    universal_seconds = min(done.universal_seconds for done in rounds)
    private_bytes = max(one["private_bytes"] for way in ways for one in way)
    figures = {
        "checkpoint_gib": round(size_bytes / 2**30, 2),
        "copy_seconds": round(copy_seconds, 2),
        "reshape_and_verify_seconds": round(seconds, 2),
        "ratio_to_copy": round(seconds / copy_seconds, 2),
        "universal_seconds": round(universal_seconds, 2),
        "times_faster_than_universal": round(universal_seconds / seconds, 1),
        "private_memory_in_partitions": round(private_bytes / (size_bytes / _RANKS), 2),
        "there_and_back_equal": int(len({one["digest"] for way in ways for one in way}) == 1),
    }
    return Result(
        figures,
        {"ratio_to_copy": ("<=", 2.0), "private_memory_in_partitions": ("<=", 2.1), "there_and_back_equal": ("==", 1)},
    )


@dataclass(frozen=True, slots=True)
class _Round:
    copy_seconds: float
    universal_seconds: float
    wide: dict[str, float]
    """What reshaping to twice the ranks took."""
    back: dict[str, float]


def _round(source: Path, home: Path) -> _Round:
    """Copy, reshape to twice the ranks, and back: each reads what lies in memory and waits until all is on the disk."""
    copied = _copy_seconds(source, home / "copy")
    shutil.rmtree(home / "copy")
    universal = _in_child("universal", str(source), str(home / "universal"))
    shutil.rmtree(home / "universal")
    wide, back = (home / name / "iter_500.pth" for name in ("wide", "back"))
    done = _in_child("reshape", str(source), str(wide), str(2 * _RANKS))
    undone = _in_child("reshape", str(wide), str(back), str(_RANKS))
    for folder in (wide, back):
        shutil.rmtree(folder)
    return _Round(copied, universal["seconds"], done, undone)


def _copy_seconds(source: Path, target: Path) -> float:
    os.sync()
    started = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    return time.perf_counter() - started


def _in_child(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.reshape", *arguments], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_synthetic(folder: Path) -> None:
    """A ZeRO-2 checkpoint of `_LAYERS` square matrices: what `_RANKS` ranks with AdamW would save, random numbers in it."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    shapes = OrderedDict((f"layers.{i}.weight", torch.Size((_WIDTH, _WIDTH))) for i in range(_LAYERS))
    mine = _LAYERS // _RANKS
    part = mine * _WIDTH * _WIDTH
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "bf16": {"enabled": True}}
    states = {
        "module": OrderedDict((name, torch.zeros(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()),
        "param_shapes": [shapes],
        "dp_world_size": _RANKS,
        "mp_world_size": 1,
        "ds_config": config,
        "ds_version": "0.19.6",
        "buffer_names": [],
    }
    folder.mkdir(parents=True)
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    for rank in range(_RANKS):
        moments = {"step": torch.tensor(500.0), "exp_avg": torch.rand(part), "exp_avg_sq": torch.rand(part)}
        optimizer = {
            "zero_stage": ZeroStageEnum(2),
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "single_partition_of_fp32_groups": [torch.rand(part)],
            "group_paddings": [0],
            "partition_count": [_RANKS],
            "param_slice_mappings": [
                OrderedDict(
                    (f"layers.{rank * mine + i}.weight", fragment_address(_WIDTH * _WIDTH, i * _WIDTH * _WIDTH))
                    for i in range(mine)
                )
            ],
            "clip_grad": 1.0,
        }
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_config": config, "ds_version": "0.19.6"},
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


def _reshape(source: str, target: str, ranks: int) -> dict[str, float | str]:
    import deepspeed  # noqa: F401
    import torch  # noqa: F401  its import is not part of the work, and not of its memory

    from core.checkpoints.reshape import reshape
    from core.runs.job import SilentProgress

    before = _private_bytes()
    peak = [before]
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, is_over))
    watcher.start()
    os.sync()
    started = time.perf_counter()
    result = reshape(source, target, ranks, progress=SilentProgress())
    os.sync()
    seconds = time.perf_counter() - started
    is_over.set()
    watcher.join()
    return {"seconds": seconds, "digest": result["digest"], "private_bytes": peak[0] - before}


def _universal(source: str, target: str) -> dict[str, float]:
    """DeepSpeed's own way, with two workers as there are two cores."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    options = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    workers = {"num_extract_workers": 2, "num_merge_workers": 2}
    os.sync()
    started = time.perf_counter()
    ds_to_universal.main(Namespace(input_folder=source, output_folder=target, **options, **workers))
    os.sync()
    return {"seconds": time.perf_counter() - started}


def _watch(peak: list[int], is_over: threading.Event) -> None:
    while not is_over.wait(0.02):
        peak[0] = max(peak[0], _private_bytes())


def _private_bytes() -> int:
    """Anonymous memory of this process now; pages of mapped files are the kernel's to drop and do not count."""
    return _status("RssAnon")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.argv[1] == "write":
        write_synthetic(Path(sys.argv[2]))
        print("{}")
    elif sys.argv[1] == "universal":
        print(json.dumps(_universal(sys.argv[2], sys.argv[3])))
    else:
        print(json.dumps(_reshape(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
