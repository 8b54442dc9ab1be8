"""Delivery against XTuner's own converters and against plain copying, in time and memory, all in one run.

Adapter: the embedded 135M model with a LoRA checkpoint that holds the optimizer too. Merge: a synthetic sharded Llama of more than 8 GB.
Each side is a process of its own, measured from its start to its end; files are dropped from the page cache before each.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.result import Result
from core.checkpoints.deliverables import ONE_THREAD

_HIDDEN, _INTERMEDIATE, _VOCABULARY, _LAYERS = 4096, 11008, 20000, 20
_SHARDS: Final = 5
_RANK: Final = 64
_SPARE_MEMORY: Final = 1.6
"""XTuner holds the base in float16; it is measured on fewer layers where this much of it does not fit."""


_OURS: Final = ("adapter", "merge", "check")


@dataclass(frozen=True, slots=True)
class Side:
    """One process, from its start to its end."""

    seconds: float
    peak_bytes: int
    processor_seconds: float
    """User and system time of all its threads: what a busy machine does not change."""


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
    _in_child("write_checkpoint", str(home))
    checkpoint, config = home / "p/train/run/iter_500.pth", home / "p/config/smollm2.py"
    ours = best_of(3, lambda n: _in_child("adapter", str(checkpoint), str(home / f"ours_{n}")))
    theirs = best_of(2, lambda n: _in_child("pth_to_hf", str(config), str(checkpoint), str(home / f"theirs_{n}")))
    size = (home / "ours_0/adapter_model.safetensors").stat().st_size
    return {
        "adapter_mib": _mib(size),
        "adapter_seconds": round(ours.seconds, 2),
        "adapter_xtuner_seconds": round(theirs.seconds, 2),
        "adapter_times_faster_than_xtuner": round(theirs.seconds / ours.seconds, 1),
        "adapter_peak_mib": _mib(ours.peak_bytes),
        "adapter_xtuner_peak_mib": _mib(theirs.peak_bytes),
        "adapter_peak_over_limit": round(ours.peak_bytes / (1.2 * size + 150e6), 2),
    }


def measure_merge(home: Path, tokenizer: Path) -> dict[str, Any]:
    """Base + adapter → model, ours, copying the base, and XTuner's merge."""
    base, adapter = home / "base", home / "lora"
    size = write_base(base, _LAYERS, tokenizer)
    write_lora(adapter, base, _LAYERS)

    def once(child: str, *arguments: str) -> Callable[[int], Side]:
        def measured(_: int) -> Side:
            shutil.rmtree(home / "out", ignore_errors=True)
            _forget(base)
            return _in_child(child, *arguments, str(home / "out"))

        return measured

    copy, ours, checked = [], [], []
    for _ in range(2):  # side by side, so that both meet the same disk
        copy.append(once("copy", str(base))(0))
        ours.append(once("merge", str(base), str(adapter))(0))
        checked.append(ours[-1].seconds + _in_child("check", str(home / "out")).seconds)
    fastest = min(copy, key=lambda side: side.seconds)
    best = min(ours, key=lambda side: side.seconds)
    xtuner_layers = _layers_that_fit(size)
    if xtuner_layers < _LAYERS:
        shutil.rmtree(base)
        shutil.rmtree(adapter)
        write_base(base, xtuner_layers, tokenizer)
        write_lora(adapter, base, xtuner_layers)
        rival = once("merge", str(base), str(adapter))(0)
    else:
        rival = best
    theirs = once("xtuner_merge", str(base), str(adapter))(0)
    return {
        "merge_model_gib": round(size / 2**30, 2),
        "copy_seconds": round(fastest.seconds, 1),
        "merge_seconds": round(best.seconds, 1),
        "copy_processor_seconds": round(fastest.processor_seconds, 1),
        "merge_processor_seconds": round(best.processor_seconds, 1),
        "merge_ratio_to_copy": round(best.seconds / fastest.seconds, 2),
        "merge_and_layers_ratio_to_copy": round(min(checked) / fastest.seconds, 2),
        "merge_peak_mib": _mib(max(side.peak_bytes for side in ours)),
        "merge_xtuner_layers": xtuner_layers,
        "merge_xtuner_seconds": round(theirs.seconds, 1),
        "merge_xtuner_processor_seconds": round(theirs.processor_seconds, 1),
        "merge_xtuner_peak_mib": _mib(theirs.peak_bytes),
        "merge_times_faster_than_xtuner": round(theirs.seconds / rival.seconds, 1),
    }


def best_of(times: int, measured: Callable[[int], Side]) -> Side:
    sides = [measured(number) for number in range(times)]
    fastest = min(sides, key=lambda side: side.seconds)
    return Side(fastest.seconds, max(side.peak_bytes for side in sides), fastest.processor_seconds)


def write_base(folder: Path, layers: int, tokenizer: Path) -> int:
    """A Llama in bfloat16 with random weights, in shards; returns its bytes."""
    from core.checkpoints.companions import copy_tokenizer
    from core.checkpoints.shards import write_shard
    from core.checkpoints.tensors import narrow

    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (_HIDDEN, _HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (_INTERMEDIATE, _HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (_HIDDEN, _INTERMEDIATE)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (_HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}
    random = np.random.default_rng(0)
    block = narrow((random.standard_normal(1 << 24) * 0.02).astype(np.float32), "BF16")
    names = list(shapes)
    place: dict[str, str] = {}
    for number in range(_SHARDS):
        group = names[number * len(names) // _SHARDS : (number + 1) * len(names) // _SHARDS]
        file = f"model-{number + 1:05d}-of-{_SHARDS:05d}.safetensors"
        values = (np.resize(block, shapes[name]) for name in group)
        write_shard(folder / file, {name: ("BF16", shapes[name]) for name in group}, values, {"format": "pt"})
        place |= dict.fromkeys(group, file)
    size = sum(int(np.prod(shape)) * 2 for shape in shapes.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": place})
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "vocab_size": _VOCABULARY,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
    )
    copy_tokenizer(tokenizer, folder)
    os.sync()
    return size


def write_lora(folder: Path, base: Path, layers: int) -> None:
    """Rank 64 on every linear layer, as XTuner's own configs have it."""
    from core.checkpoints.shards import write_shard

    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    wide = {
        "gate_proj": (_INTERMEDIATE, _HIDDEN),
        "up_proj": (_INTERMEDIATE, _HIDDEN),
        "down_proj": (_HIDDEN, _INTERMEDIATE),
    }
    square = {f"{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for part, modules in (("self_attn", square), ("mlp", wide)):
            for name, (rows, columns) in modules.items():
                key = f"base_model.model.model.layers.{layer}.{part}.{name}"
                tensors[f"{key}.lora_A.weight"] = ("F32", (_RANK, columns))
                tensors[f"{key}.lora_B.weight"] = ("F32", (rows, _RANK))
    values = ((random.standard_normal(shape) * 0.01).astype(np.float32) for _, shape in tensors.values())
    write_shard(folder / "adapter_model.safetensors", tensors, values, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": 16,
        "target_modules": [*square, *wide],
        "base_model_name_or_path": str(base),
    }
    _write_json(folder / "adapter_config.json", config)


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


def _forget(folder: Path) -> None:
    """Drop these files from the page cache, so that no side finds them warm."""
    os.sync()
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_child(*arguments: str) -> Side:
    """Run one of the commands below in a new process; its own peak is in what it prints last."""
    environment = {**os.environ, **(ONE_THREAD if arguments[0] in _OURS else {})}
    started, before = time.perf_counter(), _children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.deliver", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
    return Side(seconds, json.loads(done.stdout.splitlines()[-1]), _children_seconds() - before)


def _children_seconds() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peak_bytes() -> int:
    """Most memory this process ever had resident. Unlike getrusage's it does not begin with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _mib(size_bytes: float) -> float:
    return round(size_bytes / 2**20, 1)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def _adapter(checkpoint: str, target: str) -> None:
    from core.checkpoints.adapter import export_adapter
    from core.runs.job import SilentProgress

    export_adapter(checkpoint, target, progress=SilentProgress())


def _merge(base: str, adapter: str, target: str) -> None:
    from core.checkpoints.merge import merge_adapter
    from core.runs.job import SilentProgress

    merge_adapter(base, [adapter], target, progress=SilentProgress())


def _check(folder: str) -> None:
    from core.checkpoints.verify import verify_merge
    from core.runs.job import SilentProgress

    verify_merge(folder, method="layers", progress=SilentProgress())


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


_CHILDREN: Final[dict[str, Callable[..., None]]] = {
    "write_checkpoint": lambda home: write_checkpoint(Path(home)),
    "adapter": _adapter,
    "merge": _merge,
    "check": _check,
    "copy": _copy,
    "pth_to_hf": _pth_to_hf,
    "xtuner_merge": _xtuner_merge,
}

if __name__ == "__main__":
    _CHILDREN[sys.argv[1]](*sys.argv[2:])
    print(_peak_bytes())
