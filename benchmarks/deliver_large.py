"""Merge at InternLM2-20B's shapes, and the merge on the GPU against the one on the processor, all in one run.

`python -m benchmarks.deliver_large [--layers 48] [--gpu-layers 5] [--device cuda] [--seconds 200] [--folder FOLDER] [--small]`. Random
weights in bfloat16, in shards of 2 GB; LoRA r = 64 on every linear layer. The disk holds two models at a time. What no longer fits into
time or disk is left out and named; where the disk is slow the model gets fewer layers, and the figures say how many. `--small` shrinks
all widths, to try the command on any machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.deliver import Side, forget, in_child, mib
from benchmarks.delivery.synthetic import write_json
from benchmarks.result import NoGpu, Result, describe_machine
from core.checkpoints.blocks import read_rows
from core.checkpoints.direct import DirectWriter
from core.checkpoints.shards import INDEX, make_header, read_folder, write_shard
from core.checkpoints.tensors import Array, DiskTensor, narrow, widen

_SHARD_BYTES: Final = 2_000_000_000
_RANK: Final = 64
_NOISE_ELEMENTS: Final = 1 << 25
_WRITE_SHARE: Final = 1 / 6
"""Of the time left: while writing the base takes no more, all that follows (six times as many bytes, read or written) fits."""
_GPU_WRITE_SHARE: Final = 1 / 20
_FREE_BYTES: Final = 4 * 10**9
"""Stays free on the disk."""

Shapes = dict[str, tuple[int, ...]]
Figures = dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True)
class Widths:
    """Of InternLM2-20B (internlm2-chat-20b's config.json), or of something that any machine can take."""

    hidden: int = 6144
    heads: int = 48
    kv_heads: int = 8
    intermediate: int = 16384
    vocabulary: int = 92544

    def linears(self, layer: int) -> Shapes:
        head = self.hidden // self.heads
        prefix = f"model.layers.{layer}"
        return {
            f"{prefix}.attention.wqkv": ((self.heads + 2 * self.kv_heads) * head, self.hidden),
            f"{prefix}.attention.wo": (self.hidden, self.hidden),
            f"{prefix}.feed_forward.w1": (self.intermediate, self.hidden),
            f"{prefix}.feed_forward.w3": (self.intermediate, self.hidden),
            f"{prefix}.feed_forward.w2": (self.hidden, self.intermediate),
        }

    def layer(self, layer: int) -> Shapes:
        norms = {f"model.layers.{layer}.{name}_norm.weight": (self.hidden,) for name in ("attention", "ffn")}
        return {**{f"{name}.weight": shape for name, shape in self.linears(layer).items()}, **norms}

    def ends(self) -> Shapes:
        table = (self.vocabulary, self.hidden)
        return {"model.tok_embeddings.weight": table, "model.norm.weight": (self.hidden,), "output.weight": table}


SMALL: Final = Widths(hidden=384, heads=6, kv_heads=2, intermediate=1024, vocabulary=4096)


@dataclass
class Bench:
    """Where it runs, how long it may, and the figures so far."""

    home: Path
    widths: Widths
    deadline: float
    figures: Figures = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def left_seconds(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, figures: Figures) -> None:
        """Keep them, and print them at once: what is known stays known if the rest is cut off."""
        self.figures |= figures
        print(json.dumps(figures), flush=True)

    def side(self, name: str, *arguments: str) -> Side | None:
        """One process, or None if it ran out of time: then it is named as left out."""
        if self.left_seconds() > 1:
            try:
                return in_child(*arguments, limit_seconds=self.left_seconds())
            except subprocess.TimeoutExpired:
                pass
        self.left_out.append(name)
        return None


def run() -> Result:
    """Raises NoGpu without a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpu("needs an NVIDIA GPU")
    return measure()


def measure(
    *, layers: int = 48, gpu_layers: int = 5, device: str = "cuda", seconds: float = 200.0, folder: Path | None = None,
    widths: Widths | None = None,
) -> Result:  # fmt: skip
    """Both parts; the GPU's first, since it is the shorter."""
    with tempfile.TemporaryDirectory(dir=folder or Path.home(), prefix="danlu_benchmark_") as home:
        bench = Bench(Path(home), widths or Widths(), time.monotonic() + seconds)
        compare_devices(bench, gpu_layers, device)
        shutil.rmtree(bench.home / "base", ignore_errors=True)
        measure_large(bench, layers)
    bench.figures["left_out"] = ", ".join(bench.left_out)
    targets = {
        "large_merge_ratio_to_copy": ("<=", 1.5),
        "large_merge_and_check_ratio_to_copy": ("<=", 2.0),
        "large_merge_peak_mib": ("<", 600.0),
        "large_check_peak_mib": ("<", 600.0),
        "large_check_passed": ("==", 1),
        "gpu_largest_difference_steps": ("<=", 1),
        "gpu_check_passed": ("==", 1),
    }
    return Result(bench.figures, targets)


def measure_large(bench: Bench, layers: int) -> None:
    """Our merge, the check of its result and of every hash, and a plain copy of the base with sync."""
    base, adapter, target = bench.home / "base", bench.home / "lora", bench.home / "out"
    began = time.perf_counter()
    written, size = write_base(bench, layers, _WRITE_SHARE)
    figures: Figures = {
        "large_layers": written,
        "large_model_gb": round(size / 1e9, 2),
        "large_base_write_seconds": round(time.perf_counter() - began, 1),
        "large_adapter_mib": mib(write_lora(adapter, bench.widths, written)),
    }
    bench.note(figures)
    forget(base)
    if merge := bench.side("large merge", "merge", str(base), str(adapter), str(target)):
        bench.note({**_figures("large_merge", merge), "large_merge_gb_s": _rate(size, merge)})
        forget(base)
        if check := bench.side("large check", "check", str(target)):
            bench.note({**_figures("large_check", check), "large_check_passed": int(check.printed["passed"])})
    shutil.rmtree(target, ignore_errors=True)
    forget(base)
    if copy := bench.side("copy of the large base", "copy", str(base), str(target)):
        bench.note({"large_copy_seconds": round(copy.seconds, 1), "large_copy_gb_s": _rate(size, copy)})
    if copy and merge:
        both = round((merge.seconds + check.seconds) / copy.seconds, 2) if check else None
        ratio = round(merge.seconds / copy.seconds, 2)
        bench.note({"large_merge_ratio_to_copy": ratio, "large_merge_and_check_ratio_to_copy": both})
    for path in (base, adapter, target):
        shutil.rmtree(path, ignore_errors=True)


def compare_devices(bench: Bench, layers: int, device: str) -> None:
    """The same merge on the processor and on the GPU, twice each, side by side; and both results value by value."""
    base, adapter = bench.home / "base", bench.home / "lora"
    written, size = write_base(bench, layers, _GPU_WRITE_SHARE)
    write_lora(adapter, bench.widths, written)
    bench.note({"gpu_layers": written, "gpu_model_gb": round(size / 1e9, 2)})
    found: dict[str, list[Side]] = {"cpu": [], "gpu": []}
    for name, where in [("cpu", "cpu"), ("gpu", device)] * 2:
        target = bench.home / name
        shutil.rmtree(target, ignore_errors=True)
        forget(base)
        if side := bench.side(f"merge, {name}", "merge", str(base), str(adapter), str(target), where):
            found[name].append(side)
    for name, sides in found.items():
        if sides:
            best = min(sides, key=lambda side: side.seconds)
            alone = round(min(side.printed["merge_seconds"] for side in sides), 2)
            bench.note({**_figures(f"{name}_merge", best), f"{name}_merge_seconds_without_start": alone})
    if all((bench.home / name / "config.json").is_file() for name in found):
        bench.note({"gpu_memory_mib": mib(max(side.printed["gpu_bytes"] for side in found["gpu"]))})
        bench.note(differences(bench.home / "cpu", bench.home / "gpu"))
        if check := bench.side("check of the GPU's merge", "check", str(bench.home / "gpu")):
            bench.note({"gpu_check_passed": int(check.printed["passed"])})
    for name in (*found, "base", "lora"):
        shutil.rmtree(bench.home / name, ignore_errors=True)


def differences(one: Path, other: Path) -> Figures:
    """Values of two models in bfloat16 that differ: how many, and by how many rounding steps at most. Block by block."""
    expected = {name: tensor for shard in read_folder(one) for name, tensor in shard.tensors.items()}
    pairs = [(expected[name], tensor) for shard in read_folder(other) for name, tensor in shard.tensors.items()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 2)) as pool:
        counted = list(pool.map(lambda pair: _steps(*pair), pairs))
    different, total = sum(count for count, _ in counted), sum(tensor.numel for tensor in expected.values())
    return {
        "gpu_largest_difference_steps": max(steps for _, steps in counted),
        "gpu_values_that_differ_ppm": round(1e6 * different / total, 3),
        "gpu_values_compared": total,
    }


def _steps(one: DiskTensor, other: DiskTensor) -> tuple[int, int]:
    """Where W and its update nearly cancel, the step is float32's at the block's largest value: both add in float32, in another order."""
    different, largest = 0, 0
    blocks = (read_rows(tensor, tensor.numel, 1, 1 << 21) for tensor in (one, other))
    for (_, left), (_, right) in zip(*blocks, strict=True):
        if np.array_equal(left, right):
            continue
        values = widen(left, "BF16")
        is_apart = np.abs(values - widen(right, "BF16")) > 4 * np.spacing(np.abs(values).max())
        steps = np.where(is_apart, np.abs(_ordered(left) - _ordered(right)), 0)
        different, largest = different + int(np.count_nonzero(left != right)), max(largest, int(steps.max()))
    return different, largest


def _ordered(bits: Array) -> Array:
    """Bits of bfloat16 as whole numbers in the order of the values: neighbours differ by one, both zeros are zero."""
    size = (bits & 0x7FFF).astype(np.int32)
    return np.where(bits & 0x8000, -size, size)


def write_base(bench: Bench, layers: int, share: float) -> tuple[int, int]:
    """Random weights, shard by shard, as many of `layers` as `share` of the time left and the disk allow; (layers, bytes)."""
    folder, last = bench.home / "base", time.monotonic() + share * bench.left_seconds()
    folder.mkdir(parents=True)
    noise = narrow((np.random.default_rng(0).standard_normal(_NOISE_ELEMENTS) * 0.02).astype(np.float32), "BF16")
    free = shutil.disk_usage(folder).free - _FREE_BYTES
    place: dict[str, str] = {}
    size, written = 0, 0
    for number, (done, group) in enumerate(_groups(bench.widths, layers)):
        file = f"model-{number:05d}.safetensors"
        size += _write_shard(folder / file, group, noise.view(np.uint8))
        place |= dict.fromkeys(group, file)
        written = done
        if time.monotonic() > last or 2.1 * (size + _SHARD_BYTES) > free:
            break
    if written < layers:
        bench.left_out.append(f"{layers - written} of {layers} layers")
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": place})
    config = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", {**config, "tie_word_embeddings": False, "num_hidden_layers": written})
    return written, size


def _groups(widths: Widths, layers: int) -> Iterator[tuple[int, Shapes]]:
    """Tensors of one shard after the other, embedding and head first, and how many layers are whole after it."""
    group = widths.ends()
    for layer in range(layers):
        if _bytes(group) >= _SHARD_BYTES:
            yield layer, group
            group = {}
        group |= widths.layer(layer)
    yield layers, group


def _write_shard(file: Path, shapes: Mapping[str, tuple[int, ...]], noise: Array) -> int:
    """One buffer again and again, past the page cache, from a few threads; every tensor begins elsewhere in it. Returns its bytes."""
    header = make_header({name: ("BF16", shape) for name, shape in shapes.items()}, {"format": "pt"})
    writer = DirectWriter(file, len(header) + _bytes(shapes))
    writer.write(np.frombuffer(header, dtype=np.uint8), 0)
    pieces, offset = [], len(header)
    for number, shape in enumerate(shapes.values()):
        left, start = _bytes({"": shape}), 2 * (7919 * number % (_NOISE_ELEMENTS // 2))
        while left:
            count = min(left, 1 << 22, noise.size - start)
            pieces.append((start, count, offset))
            start, left, offset = (start + count) % noise.size, left - count, offset + count
    with ThreadPoolExecutor(min(8, os.cpu_count() or 2)) as pool:
        for written in [pool.submit(writer.write, noise[start : start + n], at) for start, n, at in pieces]:
            written.result()
    writer.finish()
    return offset


def write_lora(folder: Path, widths: Widths, layers: int) -> int:
    """In bfloat16, rank 64, on every linear layer; returns its bytes."""
    folder.mkdir(parents=True)
    shapes: Shapes = {}
    for layer in range(layers):
        for name, (rows, columns) in widths.linears(layer).items():
            shapes[f"base_model.model.{name}.lora_A.weight"] = (_RANK, columns)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (rows, _RANK)
    noise = narrow((np.random.default_rng(1).standard_normal(1 << 22) * 0.01).astype(np.float32), "BF16")
    values = (np.resize(np.roll(noise, 7919 * number), shape) for number, shape in enumerate(shapes.values()))
    file = folder / "adapter_model.safetensors"
    write_shard(file, {name: ("BF16", shape) for name, shape in shapes.items()}, values, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": 16}
    write_json(folder / "adapter_config.json", {**config, "target_modules": ["wqkv", "wo", "w1", "w2", "w3"]})
    return file.stat().st_size


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def _figures(name: str, side: Side) -> Figures:
    return {
        f"{name}_seconds": round(side.seconds, 2),
        f"{name}_processor_seconds": round(side.processor_seconds, 1),
        f"{name}_peak_mib": mib(side.peak_bytes),
    }


def _rate(size: int, side: Side) -> float:
    return round(size / 1e9 / side.seconds, 2)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deliver_large", description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--gpu-layers", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is compared with the processor")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--folder", type=Path, help="where to write; the home folder if it is not given")
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args(argv)
    widths = SMALL if chosen.small else Widths()
    result = measure(
        layers=chosen.layers, gpu_layers=chosen.gpu_layers, device=chosen.device, seconds=chosen.seconds,
        folder=chosen.folder, widths=widths,
    )  # fmt: skip
    print(json.dumps({"figures": result.figures, "missed": result.missed, "machine": describe_machine()}))
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
