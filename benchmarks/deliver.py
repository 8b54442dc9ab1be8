"""Delivery against XTuner's own converters and against plain copying, in time and memory, all in one run.

Adapter: the embedded 135M model with a LoRA checkpoint that holds the optimizer too. Merge: a synthetic sharded Llama of more than 8 GB.
Each side is a process of its own, measured from its start to its end; files are dropped from the page cache before each, but where a figure
says warm. A cold merge cannot be faster than the disk reads and writes the model: that floor is measured in the same run.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.delivery.synthetic import write_base, write_lora
from benchmarks.result import Result
from core.checkpoints.deliverables import ONE_THREAD

_LAYERS: Final = 20
_SPARE_MEMORY: Final = 1.6
"""XTuner holds the base in float16; it is measured on fewer layers where this much of it does not fit."""


_OURS: Final = ("adapter", "merge", "stream", "check")


@dataclass(frozen=True, slots=True)
class Side:
    """One process, from its start to its end."""

    seconds: float
    peak_bytes: int
    processor_seconds: float
    """User and system time of all its threads: what a busy machine does not change."""
    printed: dict[str, Any] = field(default_factory=dict)
    """What else the process said of itself."""


def run() -> Result:
    with tempfile.TemporaryDirectory(dir=Path.home(), prefix="danlu_benchmark_") as home:
        figures = measure_adapter(Path(home) / "adapter") | measure_merge(
            Path(home) / "merge", Path(home) / "adapter/p/model/smollm2"
        )
    return Result(
        figures,
        {
            "adapter_times_faster_than_xtuner": (">=", 15.0),
            "adapter_peak_over_limit": ("<", 1.0),
            "merge_ratio_to_copy": ("<=", 1.5),
            "merge_and_layers_ratio_to_copy": ("<=", 2.0),
            "merge_times_faster_than_xtuner": (">=", 8.0),
            "merge_peak_mib": ("<", 600.0),
        },
    )


def measure_adapter(home: Path) -> dict[str, Any]:
    """LoRA checkpoint → PEFT folder, ours and pth_to_hf."""
    home.mkdir(parents=True)
    in_child("write_checkpoint", str(home))
    checkpoint, config = home / "p/train/run/iter_500.pth", home / "p/config/smollm2.py"
    ours = best_of(3, lambda n: in_child("adapter", str(checkpoint), str(home / f"ours_{n}")))
    theirs = best_of(2, lambda n: in_child("pth_to_hf", str(config), str(checkpoint), str(home / f"theirs_{n}")))
    size = (home / "ours_0/adapter_model.safetensors").stat().st_size
    return {
        "adapter_mib": mib(size),
        "adapter_seconds": round(ours.seconds, 2),
        "adapter_xtuner_seconds": round(theirs.seconds, 2),
        "adapter_times_faster_than_xtuner": round(theirs.seconds / ours.seconds, 1),
        "adapter_peak_mib": mib(ours.peak_bytes),
        "adapter_xtuner_peak_mib": mib(theirs.peak_bytes),
        "adapter_peak_over_limit": round(ours.peak_bytes / (1.2 * size + 150e6), 2),
    }


def measure_merge(home: Path, tokenizer: Path) -> dict[str, Any]:
    """Base + adapter → model, ours, copying the base, and XTuner's merge."""
    base, adapter = home / "base", home / "lora"
    size = write_base(base, _LAYERS, tokenizer)
    write_lora(adapter, base, _LAYERS)

    def once(child: str, *arguments: str, is_warm: bool = False) -> Side:
        shutil.rmtree(home / "out", ignore_errors=True)
        forget(base)
        if is_warm:
            remember(base)
        return in_child(child, *arguments, str(home / "out"))

    copy, floor, ours, checked = [], [], [], []
    for _ in range(2):  # side by side, so that all meet the same disk
        copy.append(once("copy", str(base)))
        floor.append(once("stream", str(base)).seconds)
        ours.append(once("merge", str(base), str(adapter)))
        checked.append(ours[-1].seconds + in_child("check", str(home / "out")).seconds)
    fastest = min(copy, key=lambda side: side.seconds)
    best = min(ours, key=lambda side: side.seconds)
    xtuner_layers = _layers_that_fit(size)
    if xtuner_layers < _LAYERS:
        shutil.rmtree(base)
        shutil.rmtree(adapter)
        write_base(base, xtuner_layers, tokenizer)
        write_lora(adapter, base, xtuner_layers)
        rival = once("merge", str(base), str(adapter))
    else:
        rival = best
    theirs = once("xtuner_merge", str(base), str(adapter))
    ours_warm = once("merge", str(base), str(adapter), is_warm=True)
    theirs_warm = once("xtuner_merge", str(base), str(adapter), is_warm=True)
    return {
        "merge_model_gib": round(size / 2**30, 2),
        "copy_seconds": round(fastest.seconds, 1),
        "merge_seconds": round(best.seconds, 1),
        "copy_processor_seconds": round(fastest.processor_seconds, 1),
        "merge_processor_seconds": round(best.processor_seconds, 1),
        "merge_disk_floor_seconds": round(min(floor), 1),
        "merge_ratio_to_disk_floor": round(best.seconds / min(floor), 2),
        "merge_ratio_to_copy": round(best.seconds / fastest.seconds, 2),
        "merge_and_layers_ratio_to_copy": round(min(checked) / fastest.seconds, 2),
        "merge_peak_mib": mib(max(side.peak_bytes for side in ours)),
        "merge_xtuner_layers": xtuner_layers,
        "merge_xtuner_seconds": round(theirs.seconds, 1),
        "merge_xtuner_processor_seconds": round(theirs.processor_seconds, 1),
        "merge_xtuner_peak_mib": mib(theirs.peak_bytes),
        "merge_times_faster_than_xtuner": round(theirs.seconds / rival.seconds, 1),
        "merge_warm_seconds": round(ours_warm.seconds, 1),
        "merge_xtuner_warm_seconds": round(theirs_warm.seconds, 1),
        "merge_warm_times_faster_than_xtuner": round(theirs_warm.seconds / ours_warm.seconds, 1),
    }


def best_of(times: int, measured: Callable[[int], Side]) -> Side:
    sides = [measured(number) for number in range(times)]
    fastest = min(sides, key=lambda side: side.seconds)
    return Side(fastest.seconds, max(side.peak_bytes for side in sides), fastest.processor_seconds)


def write_checkpoint(home: Path) -> None:
    """A LoRA checkpoint of the embedded model as mmengine saves it: weights, two moments each, the config."""
    import torch
    from mmengine.config import Config
    from xtuner.registry import BUILDER

    from core.config.facts import Machine, read_data, read_model
    from core.config.presets import Wishes, make
    from core.config.source import ConfigSource
    from core.models.embedded import write_embedded_model
    from core.project import open_project
    from core.runs.job import SilentProgress
    from core.xtuner.runtime.compat import Facts, apply

    (home / "p").mkdir(parents=True)
    project = open_project(home / "p")
    rows = project.data / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    wishes = Wishes(method="lora", max_length=64)
    write_embedded_model(str(project.model / "smollm2"), progress=SilentProgress())
    text = make(read_model(project.model / "smollm2"), read_data(rows), Machine(cpu_count=2), wishes)
    config = project.config / "smollm2.py"
    config.write_text(ConfigSource(text).text, encoding="utf-8")
    loaded = Config.fromfile(str(config))
    apply(loaded, Facts(is_cpu=True))
    model = BUILDER.build(loaded.model)
    state = {name: torch.randn_like(value) * 0.01 for name, value in model.state_dict().items()}
    moments = {
        n: {"exp_avg": torch.rand_like(v), "exp_avg_sq": torch.rand_like(v)} for n, v in enumerate(state.values())
    }
    checkpoint = project.train / "run" / "iter_500.pth"
    checkpoint.parent.mkdir(parents=True)
    meta = {"iter": 500, "epoch": 0, "cfg": loaded.pretty_text}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": moments, "param_groups": []}}, checkpoint)


def _layers_that_fit(size: int) -> int:
    import psutil

    free = psutil.virtual_memory().available
    return _LAYERS if free > _SPARE_MEMORY * size else max(2, int(_LAYERS * free / (_SPARE_MEMORY * size)))


def forget(folder: Path) -> None:
    """Drop these files from the page cache, so that no side finds them warm."""
    os.sync()
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Bring these files into the page cache, as after a training that began with them; what does not fit stays out."""
    for file in folder.iterdir():
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def in_child(*arguments: str, limit_seconds: float | None = None) -> Side:
    """Run one of the commands below in a new process; its own peak is in what it prints last. Raises TimeoutExpired."""
    environment = {**os.environ, **(ONE_THREAD if arguments[0] in _OURS else {})}
    started, before = time.perf_counter(), _children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.deliver", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=limit_seconds,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
    printed = json.loads(done.stdout.splitlines()[-1])
    return Side(seconds, printed.pop("peak_bytes"), _children_seconds() - before, printed)


def _children_seconds() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peak_bytes() -> int:
    """Most memory this process ever had resident. Unlike getrusage's it does not begin with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def mib(size_bytes: float) -> float:
    return round(size_bytes / 2**20, 1)


def _adapter(checkpoint: str, target: str) -> None:
    from core.checkpoints.adapter import export_adapter
    from core.runs.job import SilentProgress

    export_adapter(checkpoint, target, progress=SilentProgress())


def _merge(base: str, adapter: str, target: str, device: str = "cpu") -> dict[str, Any]:
    from core.checkpoints.merge import merge_adapter
    from core.runs.job import SilentProgress

    if device != "cpu":
        import torch

        torch.zeros(1, device=device)  # the GPU's start counts for the process, not for the merge
    started = time.perf_counter()
    merge_adapter(base, [adapter], target, device=device, progress=SilentProgress())
    seconds = time.perf_counter() - started
    gpu_bytes = 0 if device == "cpu" else torch.cuda.max_memory_reserved()
    return {"merge_seconds": seconds, "gpu_bytes": gpu_bytes}


def _stream(base: str, target: str) -> None:
    """The bytes of a merge read, written and synced as the merge does, without arithmetic: the least that this disk allows."""
    from core.checkpoints.shards import read_folder
    from core.checkpoints.writer import FilePlan, Output, Writer
    from core.runs.job import SilentProgress

    folder = Path(target)
    folder.mkdir()
    shards = read_folder(Path(base))
    with Writer(sum(shard.size_bytes for shard in shards), SilentProgress()) as writer:
        for shard in shards:
            outputs = [Output(name, tensor, tensor.offset, None) for name, tensor in shard.tensors.items()]
            writer.write(FilePlan(folder / shard.file.name, shard.header_bytes, outputs))
    os.sync()


def _check(folder: str) -> dict[str, Any]:
    from core.checkpoints.verify import verify_merge
    from core.runs.job import SilentProgress

    figures = verify_merge(folder, method="layers", progress=SilentProgress())
    return {key: figures[key] for key in ("passed", "tensors", "differing_tensors", "layer_error", "layer_tolerance")}


def _copy(base: str, target: str) -> None:
    shutil.copytree(base, target)
    os.sync()


def _pth_to_hf(config: str, checkpoint: str, target: str) -> None:
    from xtuner.tools.model_converters import pth_to_hf

    _patch(config)
    sys.argv = ["pth_to_hf", config, checkpoint, target, "--safe-serialization"]
    pth_to_hf.main()
    os.sync()


def _xtuner_merge(base: str, adapter: str, target: str) -> None:
    from xtuner.tools.model_converters import merge

    sys.argv = ["merge", base, adapter, target, "--safe-serialization", "--device", "cpu"]
    merge.main()
    os.sync()


def _patch(config: str) -> None:
    from mmengine.config import Config

    from core.xtuner.runtime.compat import Facts, apply

    apply(Config.fromfile(config), Facts(is_cpu=True))


_CHILDREN: Final[dict[str, Callable[..., dict[str, Any] | None]]] = {
    "write_checkpoint": lambda home: write_checkpoint(Path(home)),
    "adapter": _adapter,
    "merge": _merge,
    "stream": _stream,
    "check": _check,
    "copy": _copy,
    "pth_to_hf": _pth_to_hf,
    "xtuner_merge": _xtuner_merge,
}

if __name__ == "__main__":
    said = _CHILDREN[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({**(said or {}), "peak_bytes": _peak_bytes()}))
