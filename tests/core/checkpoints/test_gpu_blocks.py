"""The GPU's arithmetic, run by torch on the processor: the same values as numpy's within one rounding step, in the same file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints import gpu_blocks, merge
from core.checkpoints.deliverables import gpus_for
from core.checkpoints.gpu_blocks import CPU, CUDA, GpuBlocks
from core.checkpoints.merge import merge_adapter
from core.checkpoints.shards import read_folder, read_shard
from core.checkpoints.tensors import widen
from core.checkpoints.verify import verify_merge
from core.errors import DanluError, InputError, MachineError
from core.runs.job import SilentProgress
from tests.core.checkpoints.adapters import read_model, steps_apart
from tests.core.checkpoints.crafted import DEFAULT_MODULES, write_adapter, write_adapter_tensors
from tests.models import write_tiny_llama

Merge = Callable[..., Path]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Merge:
    """A merge that asks for the GPU and gets torch on the processor."""

    def merged(base: Path, adapter: Path, target: Path) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(merge, "GpuBlocks", lambda _: GpuBlocks(CPU))
            patch.setattr(gpu_blocks, "BLOCK_ELEMENTS", 1000)  # several blocks a tensor, and an odd one at the end
            merge_adapter(str(base), [str(adapter)], str(target), device=CUDA, progress=SilentProgress())
        return target

    return merged


def write_variant(folder: Path, base: Path, variant: str) -> Path:
    """An adapter with what the GPU computes, and with what it leaves to the processor."""
    if variant == "plain":
        return write_adapter(folder, base, modules=[*DEFAULT_MODULES, "lm_head"])
    random = np.random.default_rng(3)
    module = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{module}.lora_A.weight": random.normal(0, 0.1, (4, 64)).astype(np.float32),
        f"{module}.lora_B.weight": random.normal(0, 0.1, (128, 4)).astype(np.float32),
    }
    if variant == "DoRA":
        tensors[f"{module}.lora_magnitude_vector"] = random.uniform(0.5, 2, 128).astype(np.float32)
        return write_adapter_tensors(folder, tensors, use_dora=True)
    if variant == "replaced":
        tensors["base_model.model.model.norm.weight"] = random.normal(1, 0.1, 64).astype(np.float32)
        return write_adapter_tensors(folder, tensors, modules_to_save=["norm"])
    embedding = "base_model.model.model.embed_tokens"
    tensors[f"{embedding}.lora_embedding_A"] = random.normal(0, 0.1, (4, 512)).astype(np.float32)
    tensors[f"{embedding}.lora_embedding_B"] = random.normal(0, 0.1, (64, 4)).astype(np.float32)
    return write_adapter_tensors(folder, tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("variant", ["plain", "DoRA", "replaced", "embedding"])
def test_values_are_the_processor_s_within_one_step(variant: str, dtype: str, on_gpu: Merge, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", dtype=dtype, shards=2)
    adapter = write_variant(tmp_path / "adapter", base, variant)
    merge_adapter(str(base), [str(adapter)], str(tmp_path / "here"), progress=SilentProgress())
    found = read_model(on_gpu(base, adapter, tmp_path / "there"))
    expected = read_model(tmp_path / "here")
    assert steps_apart(found, {name: widen(bits, kind) for name, (kind, bits) in expected.items()}) <= 1
    assert {name for name, (_, bits) in found.items() if not np.array_equal(bits, read_model(base)[name][1])}
    assert verify_merge(str(tmp_path / "there"), method="layers", progress=SilentProgress())["passed"]


def test_a_file_whose_tensors_lie_at_odd_bytes(on_gpu: Merge, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", dtype="bfloat16")
    adapter = write_adapter(tmp_path / "adapter", base)
    expected = read_model(on_gpu(base, adapter, tmp_path / "even"))
    file = base / "model.safetensors"
    shard = read_shard(file)
    header = shard.header_bytes[8:] + b" "
    values = file.read_bytes()[len(shard.header_bytes) :]
    file.write_bytes(len(header).to_bytes(8, "little") + header + values)
    found = read_model(on_gpu(base, adapter, tmp_path / "odd"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name][1], bits) for name, (_, bits) in expected.items())


def refused(call: Merge, base: Path, adapter: Path, target: Path) -> DanluError:
    with pytest.raises(DanluError) as caught:
        call(base, adapter, target)
    assert not list(target.parent.glob(f"*{target.name}*"))
    return caught.value


def test_nan_in_the_base_and_values_too_large(on_gpu: Merge, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", dtype="float16")
    module = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{module}.lora_A.weight": np.full((4, 64), 100, np.float32),
        f"{module}.lora_B.weight": np.full((128, 4), 100, np.float32),
    }
    large = write_adapter_tensors(tmp_path / "large", tensors)
    assert refused(on_gpu, base, large, tmp_path / "out").code == "checkpoints.overflow"
    shard = read_folder(base)[0]
    with open(shard.file, "r+b") as stream:
        stream.seek(shard.tensors[f"{DEFAULT_MODULES[1]}.weight"].offset)
        stream.write(b"\xff\x7f")
    adapter = write_adapter(tmp_path / "adapter", base)
    error = refused(on_gpu, base, adapter, tmp_path / "out")
    assert (type(error), error.code) == (InputError, "checkpoints.not_finite")


def test_without_a_gpu_it_says_so_before_it_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base = write_tiny_llama(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)

    def merged(base: Path, adapter: Path, target: Path) -> Any:
        return merge_adapter(str(base), [str(adapter)], str(target), device=CUDA, progress=SilentProgress())

    error = refused(merged, base, adapter, tmp_path / "out")
    assert (type(error), error.code) == (MachineError, "checkpoints.no_gpu")


def test_a_job_for_the_gpu_does_not_start_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.checkpoints.deliverables.idle_gpu", lambda: None)
    assert gpus_for(CPU) == []
    with pytest.raises(MachineError) as caught:
        gpus_for(CUDA)
    assert caught.value.code == "checkpoints.no_gpu"


def test_a_full_gpu_is_told_and_nothing_is_left(on_gpu: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(GpuBlocks, "_block", full)
    base = write_tiny_llama(tmp_path / "base")
    error = refused(on_gpu, base, write_adapter(tmp_path / "adapter", base), tmp_path / "out")
    assert (type(error), error.code) == (MachineError, "checkpoints.gpu_memory")
