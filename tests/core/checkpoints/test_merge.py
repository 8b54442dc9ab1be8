"""The merge where something is wrong: bad bases, bad adapters, bad disks, and a process that is killed in the middle."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints import blocks
from core.checkpoints.merge import merge_adapter
from core.checkpoints.shards import read_folder, read_shard, write_shard
from core.checkpoints.staging import left_bytes, leftovers, remove_leftover, staging_folder
from core.checkpoints.tensors import narrow, widen
from core.checkpoints.verify import verify_merge
from core.errors import ConflictError, DanluError, JobError, MachineError
from core.messages import Message
from core.runs.job import SilentProgress
from tests.core.checkpoints.crafted import DEFAULT_MODULES, digest, write_adapter, write_adapter_tensors
from tests.models import write_tiny_llama, write_tiny_qwen2

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "base", dtype="bfloat16", shards=3)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def merge(base: Path, adapter: Path, **options: Any) -> Path:
    target = base.parent / "out" / "merged"
    merge_adapter(str(base), [str(adapter)], str(target), **{"progress": SilentProgress(), **options})
    return target


def refused(base: Path, *adapters: Path, **options: Any) -> DanluError:
    """The error of a merge that must leave base and adapters as they were, and nothing else behind."""
    before = {folder: digest(folder) for folder in (base, *adapters)}
    target = base.parent / "out" / "merged"
    names = [str(adapter) for adapter in adapters]
    with pytest.raises(DanluError) as caught:
        merge_adapter(str(base), names, str(target), **{"progress": SilentProgress(), **options})
    assert before == {folder: digest(folder) for folder in (base, *adapters)}
    out = base.parent / "out"
    assert not out.exists() or not any(out.iterdir())
    return caught.value


def test_result_has_the_base_s_files_headers_and_untouched_bytes(base: Path, adapter: Path) -> None:
    (base / "modeling_tiny.py").write_text("# remote code\n")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    target = merge(base, adapter)
    for shard in read_folder(base):
        assert read_shard(target / shard.file.name).header_bytes == shard.header_bytes
    for name in (INDEX, "config.json", "generation_config.json", "tokenizer.json", "modeling_tiny.py"):
        assert (target / name).read_bytes() == (base / name).read_bytes()
    assert not (target / "pytorch_model.bin").exists()
    before = {name: tensor for shard in read_folder(base) for name, tensor in shard.tensors.items()}
    after = {name: tensor for shard in read_folder(target) for name, tensor in shard.tensors.items()}
    differing = {name for name in before if not np.array_equal(before[name].read(), after[name].read())}
    assert differing == {f"{module}.weight" for module in DEFAULT_MODULES}
    assert not list(target.glob(".*"))


def test_a_merged_value_is_the_formula_rounded_once(base: Path, adapter: Path) -> None:
    target = merge(base, adapter)
    tensors = read_shard(adapter / "adapter_model.safetensors").tensors
    for module in DEFAULT_MODULES:
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].read().astype(np.float64) for part in "AB")
        whole = {name: tensor for shard in read_folder(base) for name, tensor in shard.tensors.items()}
        exact = widen(whole[f"{module}.weight"].read(), "BF16") + 2.0 * (b @ a)
        merged = {name: tensor for shard in read_folder(target) for name, tensor in shard.tensors.items()}
        found = widen(merged[f"{module}.weight"].read(), "BF16")
        # Half a step of bfloat16 is at most 2^-8 of the value; the rest is float32's.
        assert np.all(np.abs(found - exact) <= np.abs(exact) * 2**-8 + 1e-7)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_an_adapter_in_half_precision_counts_with_the_values_it_has(
    dtype: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = read_shard(adapter / "adapter_model.safetensors").tensors
    values = {name: tensor.read() for name, tensor in tensors.items()}
    half = write_adapter_tensors(tmp_path / "half", values, dtype)
    rounded = {
        name: widen(narrow(value.reshape(-1), dtype), dtype).reshape(value.shape) for name, value in values.items()
    }
    written = [half, write_adapter_tensors(tmp_path / "rounded", rounded)]
    found = []
    for number, one in enumerate(written):
        shards = digest(merge(base, one))
        (base.parent / "out").rename(base.parent / f"out_{number}")
        found.append({name: value[2] for name, value in shards.items() if name.endswith(".safetensors")})
    assert found[0] == found[1]


def test_small_blocks_give_the_same_bytes(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest(merge(base, adapter))
    (base.parent / "out").rename(base.parent / "first")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    again = digest(merge(base, adapter))
    assert {name: value[2] for name, value in whole.items() if name.endswith(".safetensors")} == {
        name: value[2] for name, value in again.items() if name.endswith(".safetensors")
    }


def test_truncated_shard(base: Path, adapter: Path) -> None:
    file = base / SECOND
    file.write_bytes(file.read_bytes()[:-10])
    error = refused(base, adapter)
    assert (error.code, error.params["path"]) == ("checkpoints.truncated", str(file))


def test_truncated_header(base: Path, adapter: Path) -> None:
    (base / SECOND).write_bytes((base / SECOND).read_bytes()[:5])
    assert refused(base, adapter).code == "checkpoints.truncated"


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": 3}',
        b"[]",
        b'{"a":{"dtype":"X","shape":[],"data_offsets":[0,0]}}',
    ],
)
def test_broken_header(text: bytes, base: Path, adapter: Path) -> None:
    (base / SECOND).write_bytes(len(text).to_bytes(8, "little") + text)
    assert refused(base, adapter).code == "checkpoints.broken_shard"


def test_header_that_overlaps(base: Path, adapter: Path) -> None:
    text = json.dumps({
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    }).encode()  # fmt: skip
    (base / SECOND).write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    assert refused(base, adapter).code == "checkpoints.broken_shard"


def test_missing_shard(base: Path, adapter: Path) -> None:
    (base / SECOND).unlink()
    error = refused(base, adapter)
    assert (error.code, error.params["name"]) == ("checkpoints.missing_shard", SECOND)


@pytest.mark.parametrize(
    "lie",
    [
        lambda place: place.update({"model.extra.weight": SECOND}),
        lambda place: place.pop("model.norm.weight"),
        lambda place: place.update({"model.norm.weight": next(f for f in place.values() if f != place["model.norm.weight"])}),
        lambda place: place.update({"model.norm.weight": "../base/model-00001-of-00003.safetensors"}),
        lambda place: place.clear(),
    ],
)  # fmt: skip
def test_index_that_lies(lie: Any, base: Path, adapter: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    lie(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))
    assert refused(base, adapter).code == "checkpoints.lying_index"


def test_base_without_config_or_weights(base: Path, adapter: Path) -> None:
    for file in [*base.glob("*.safetensors"), base / INDEX]:
        file.unlink()
    assert refused(base, adapter).code == "checkpoints.no_weights"
    (base / "config.json").unlink()
    assert refused(base, adapter).code == "checkpoints.no_base"


def test_quantized_base(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    assert refused(base, adapter).code == "checkpoints.quantized_base"


def test_adapter_of_another_architecture(base: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", layers=4)
    adapter = write_adapter(tmp_path / "adapter", other, modules=["model.layers.3.mlp.up_proj"])
    error = refused(base, adapter)
    assert (error.code, error.params["count"]) == ("checkpoints.unused_keys", 2)
    assert "layers.3.mlp.up_proj" in error.params["names"]


def test_adapter_of_another_size(base: Path, tmp_path: Path) -> None:
    tensors = {
        "base_model.model.model.norm_x.lora_A.weight": np.ones((4, 64), np.float32),
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((4, 32), np.float32),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": np.ones((128, 4), np.float32),
    }
    assert refused(base, write_adapter_tensors(tmp_path / "a", tensors)).code == "checkpoints.unused_keys"
    del tensors["base_model.model.model.norm_x.lora_A.weight"]
    error = refused(base, write_adapter_tensors(tmp_path / "b", tensors))
    assert (error.code, error.params["base"]) == ("checkpoints.shape_differs", "(128, 64)")


@pytest.mark.parametrize("drop", ["lora_A", "lora_B"])
def test_half_a_pair(drop: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = {
        name: tensor.read() for name, tensor in read_shard(adapter / "adapter_model.safetensors").tensors.items()
    }
    half = {name: value for name, value in tensors.items() if drop not in name or "q_proj" not in name}
    assert refused(base, write_adapter_tensors(tmp_path / "half", half)).code == "checkpoints.unused_keys"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adapter_with_nan(value: float, base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = {
        name: tensor.read() for name, tensor in read_shard(adapter / "adapter_model.safetensors").tensors.items()
    }
    name = sorted(tensors)[0]
    tensors[name][0, 3] = value
    error = refused(base, write_adapter_tensors(tmp_path / "bad", tensors))
    assert (error.code, error.params["name"]) == ("checkpoints.not_finite", name)


def test_merged_value_too_large_for_float16(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", dtype="float16")
    module = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{module}.lora_A.weight": np.full((4, 64), 100, np.float32),
        f"{module}.lora_B.weight": np.full((128, 4), 100, np.float32),
    }
    assert refused(base, write_adapter_tensors(tmp_path / "adapter", tensors)).code == "checkpoints.overflow"


def test_base_with_nan(base: Path, adapter: Path) -> None:
    shard = next(shard for shard in read_folder(base) if f"{DEFAULT_MODULES[0]}.weight" in shard.tensors)
    with open(shard.file, "r+b") as stream:
        stream.seek(shard.tensors[f"{DEFAULT_MODULES[0]}.weight"].offset)
        stream.write(b"\xc0\x7f")
    assert refused(base, adapter).code == "checkpoints.not_finite"


@pytest.mark.parametrize(
    ("key", "value"), [("peft_type", "LOHA"), ("a_feature_of_2031", True), ("layer_replication", [[0, 1]])]
)
def test_unknown_kind_of_adapter(key: str, value: Any, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **{key: value})
    assert refused(base, adapter).code == "checkpoints.unsupported_adapter"


def test_no_adapter_at_all(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert refused(base, tmp_path / "adapter").code == "checkpoints.not_adapter"


def test_two_adapters_that_replace(base: Path, tmp_path: Path) -> None:
    head = {"base_model.model.lm_head.weight": np.ones((512, 64), np.float32)}
    first, second = (write_adapter_tensors(tmp_path / name, head) for name in ("first", "second"))
    assert refused(base, first, second).code == "checkpoints.cannot_combine"


def test_target_that_exists_is_never_overwritten(base: Path, adapter: Path) -> None:
    target = base.parent / "out" / "merged"
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("keep")
    with pytest.raises(ConflictError):
        merge(base, adapter)
    assert (target / "mine.txt").read_text() == "keep"


def test_read_only_target(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every folder can be written, so the kernel's answer is given in its place."""

    def denied(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    error = refused(base, adapter)
    assert (type(error), error.code) == (MachineError, "checkpoints.read_only")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_halfway(number: int, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = [0], os.pwrite
    half = sum(shard.size_bytes for shard in read_folder(base)) // 2

    def pwrite(handle: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > half:
            raise OSError(number, "No space left on device")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    error = refused(base, adapter)
    assert (type(error), error.code) == (MachineError, "checkpoints.disk_full")
    assert written[0] > half


def test_too_little_space_is_said_before_the_start(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.files.shutil.disk_usage", lambda _: type("usage", (), {"free": 1000}))
    assert refused(base, adapter).code == "files.no_space"


def test_cancelled(base: Path, adapter: Path) -> None:
    class Stopping(SilentProgress):
        def update(self, done: float, total: float | None, message: Message, *, unit: str = "") -> None:
            if done:
                raise JobError("runs.cancelled")

    assert refused(base, adapter, progress=Stopping()).code == "runs.cancelled"


KILLED = """
import os, signal, sys
from core.checkpoints import merge, writer
from core.runs.job import SilentProgress

real = os.fsync
def fsync(handle, count=[0]):
    real(handle)
    count[0] += os.readlink(f"/proc/self/fd/{handle}").endswith(".writing")
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
writer.os.fsync = fsync
merge.merge_adapter(sys.argv[1], [sys.argv[2]], sys.argv[3], progress=SilentProgress())
"""


def killed(base: Path, adapter: Path) -> Path:
    target = base.parent / "out" / "merged"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(base), str(adapter), str(target)], check=False, timeout=600
    )
    assert done.returncode == -9
    return target


def test_killed_merge_looks_like_nothing_and_goes_on(base: Path, adapter: Path) -> None:
    target = killed(base, adapter)
    assert not target.exists()
    part = staging_folder(target)
    assert not (part / "config.json").exists()
    whole = sorted(part.glob("*.safetensors"))
    assert len(whole) == 1, "the second was on the disk, but without its name"
    stamp = whole[0].stat().st_mtime_ns
    time.sleep(0.02)
    merge(base, adapter)
    assert not part.exists()
    assert (target / whole[0].name).stat().st_mtime_ns == stamp
    (base.parent / "out").rename(base.parent / "resumed")
    clean = digest(merge(base, adapter))
    resumed = digest(base.parent / "resumed" / "merged")
    files = [name for name in clean if name not in ("danlu.json", "README.md")]
    assert {name: clean[name][2] for name in files} == {name: resumed[name][2] for name in files}


def test_killed_merge_of_another_adapter_is_not_gone_on_with(base: Path, adapter: Path, tmp_path: Path) -> None:
    killed(base, adapter)
    other = write_adapter(tmp_path / "other", base, seed=5)
    target = merge(base, other)
    resumed = {name: value[2] for name, value in digest(target).items() if name.endswith(".safetensors")}
    (base.parent / "out").rename(base.parent / "first")
    clean = {name: value[2] for name, value in digest(merge(base, other)).items() if name.endswith(".safetensors")}
    assert clean == resumed


def test_what_a_killed_merge_left_is_listed_needs_no_space_twice_and_can_be_removed(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = killed(base, adapter)
    (found,) = leftovers(target.parent)
    assert (found.target, found.size_bytes) == (target, left_bytes(target))
    missing = sum(shard.size_bytes for shard in read_folder(base)) + 2**24 - left_bytes(target)
    usage = type("usage", (), {"free": missing - 1})
    with monkeypatch.context() as patch:
        patch.setattr("core.files.shutil.disk_usage", lambda _: usage)
        with pytest.raises(MachineError) as caught:
            merge(base, adapter)
        assert caught.value.code == "files.no_space"
        assert leftovers(target.parent) == [found]
        usage.free = missing
        merge(base, adapter)
    assert leftovers(target.parent) == []
    (target.parent / "made").mkdir()
    target.rename(staging_folder(target))  # a kill just before the renaming: whole, but without its plan
    remove_leftover(target)
    assert [path.name for path in target.parent.iterdir()] == ["made"]


def test_a_merge_that_is_running_is_left_alone(base: Path, adapter: Path) -> None:
    target = killed(base, adapter)
    plan_file = staging_folder(target) / ".plan.json"
    plan = json.loads(plan_file.read_text())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        from core.runs.processes import identify

        identity = identify(other.pid)
        assert identity is not None
        plan_file.write_text(json.dumps({**plan, "process": identity.to_json()}))
        with pytest.raises(ConflictError) as caught:
            merge(base, adapter)
        assert caught.value.code == "checkpoints.being_written"
        assert leftovers(target.parent) == []
        with pytest.raises(ConflictError):
            remove_leftover(target)
        # The same pid, but another process has it: the one that wrote is gone.
        plan_file.write_text(json.dumps({**plan, "process": {**identity.to_json(), "started_ticks": 1}}))
        merge(base, adapter)
        other.communicate(b"\n")
    assert target.is_dir()


def test_tied_base_keeps_its_head_tied(tmp_path: Path) -> None:
    base = write_tiny_qwen2(tmp_path / "base")
    target = merge(base, write_adapter(tmp_path / "adapter", base))
    assert "lm_head.weight" not in read_shard(target / "model.safetensors").tensors
    assert (target / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_base_saved_without_its_head_lacks_the_prefix_and_still_fits(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shards = [
        tensor for shard in read_folder(base) for tensor in shard.tensors.items() if tensor[0] != "lm_head.weight"
    ]
    tensors = {name.removeprefix("model."): tensor for name, tensor in shards}
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_shard(bare / "model.safetensors", layout, [tensor.read() for tensor in tensors.values()], {"format": "pt"})
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    target = merge(bare, write_adapter(tmp_path / "adapter", base))
    assert read_shard(target / "model.safetensors").tensors.keys() == tensors.keys()


def write_torch_files(base: Path, *, tied: tuple[str, str] | None = None) -> dict[str, Any]:
    """Replace the safetensors of `base` by torch's own files with the same tensors, one of them stored transposed. `tied`: a second name
    of one tensor."""
    import torch
    from safetensors.torch import load_file

    whole: dict[str, Any] = {}
    place = {}
    for number, file in enumerate(files := sorted(base.glob("*.safetensors")), start=1):
        state = load_file(file)
        if tied and tied[0] in state:
            state[tied[1]] = state[tied[0]]
        for name in ("model.layers.0.mlp.up_proj.weight", f"{DEFAULT_MODULES[0]}.weight"):
            if name in state:
                state[name] = state[name].T.contiguous().T
        name = "pytorch_model.bin" if len(files) == 1 else f"pytorch_model-{number:05d}-of-{len(files):05d}.bin"
        torch.save(state, base / name)
        whole |= state
        place |= dict.fromkeys(state, name)
        file.unlink()
    (base / INDEX).unlink(missing_ok=True)
    if len(files) > 1:
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return whole


def test_base_in_torch_s_own_files_gives_the_same_model(base: Path, adapter: Path) -> None:
    expected = {name: t.read() for shard in read_folder(merge(base, adapter)) for name, t in shard.tensors.items()}
    (base.parent / "out").rename(base.parent / "first")
    write_torch_files(base)
    target = merge(base, adapter)
    found = {name: t.read() for shard in read_folder(target) for name, t in shard.tensors.items()}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    assert [file.name for file in sorted(target.glob("model*"))] == [
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        INDEX,
    ]
    assert not list(target.glob("*.bin*"))
    assert verify_merge(str(target), method="layers", progress=SilentProgress())["passed"]


def test_tied_head_in_torch_s_file_is_written_once(tmp_path: Path) -> None:
    base = write_tiny_qwen2(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    write_torch_files(base, tied=("model.embed_tokens.weight", "lm_head.weight"))
    target = merge(base, adapter)
    assert "lm_head.weight" not in read_shard(target / "model.safetensors").tensors
    assert not (target / INDEX).exists()


def test_torch_file_that_would_run_code_or_lacks_a_shard(base: Path, adapter: Path) -> None:
    write_torch_files(base)
    (base / "pytorch_model-00002-of-00003.bin").unlink()
    assert refused(base, adapter).code == "checkpoints.missing_shard"
    (base / "pytorch_model.bin.index.json").unlink()
    import torch

    torch.save({"model.norm.weight": torch.ones(64), "call": os.system}, base / "pytorch_model.bin")
    assert refused(base, adapter).code == "checkpoints.unsafe"
