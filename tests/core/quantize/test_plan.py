"""What can become 4-bit, in which groups, and what is refused with its reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.checkpoints.shards import read_folder
from core.checkpoints.tensors import DiskTensor
from core.errors import DanluError, InputError
from core.quantize import plan as planning
from core.quantize.plan import fitting_group, matrices, plan_quantization, require_plan
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2


@pytest.mark.parametrize("write", [write_tiny_llama, write_tiny_qwen2])
def test_linear_layers_are_chosen_and_their_size_is_foretold(write: Callable[..., Path], tmp_path: Path) -> None:
    base = write(tmp_path / "base", dtype="bfloat16", shards=2)
    plan = plan_quantization(base, tmp_path / "target")
    assert plan.can_start
    assert (plan.group_size, plan.dtype, plan.matrices) == (64, "bfloat16", 2 * 7)
    shards = read_folder(base)
    names = set(matrices(shards))
    assert not any(part in name for name in names for part in ("embed", "lm_head", "norm", "bias"))
    whole = sum(shard.size_bytes for shard in shards)
    numbers = sum(tensor.numel for tensor in matrices(shards).values())
    assert plan.target_bytes == whole - 2 * numbers + numbers // 2 + 2 * numbers // 64


@pytest.mark.parametrize(
    ("widths", "group"), [((128, 256), 128), ((576, 1536), 64), ((96, 128), 32), ((4096, 11008), 128)]
)
def test_the_largest_group_that_fits_every_width_is_taken(widths: tuple[int, ...], group: int) -> None:
    chosen = {f"{width}.weight": DiskTensor(Path("x"), "BF16", (8, width), 0) for width in widths}
    assert fitting_group(chosen) == group


def test_a_width_that_no_group_fits_is_named() -> None:
    chosen = {
        "a.weight": DiskTensor(Path("x"), "BF16", (8, 64), 0),
        "b.weight": DiskTensor(Path("x"), "BF16", (8, 40), 0),
    }
    with pytest.raises(InputError) as caught:
        fitting_group(chosen)
    assert (caught.value.code, caught.value.params["name"], caught.value.params["width"]) == (
        "quantize.group",
        "b.weight",
        40,
    )


def test_what_cannot_be_quantised_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(model: Path, target: str = "target") -> DanluError:
        plan = plan_quantization(model, tmp_path / target)
        assert plan.problem is not None
        assert not plan.can_start
        return plan.problem

    own_code = refusal(write_tiny_internlm2(tmp_path / "internlm2"))
    assert (own_code.code, own_code.params["architecture"]) == ("quantize.remote_code", "internlm2")
    base = write_tiny_llama(tmp_path / "base", dtype="bfloat16")
    assert refusal(base, "internlm2").code == "files.exists"
    config = json.loads((base / "config.json").read_text())
    unknown = shutil.copytree(base, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert refusal(unknown).code == "quantize.architecture"
    quantized = shutil.copytree(base, tmp_path / "quantized")
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    assert refusal(quantized).code == "checkpoints.quantized_base"
    empty = shutil.copytree(base, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    assert refusal(empty).code == "checkpoints.no_weights"
    mixed = write_tiny_llama(tmp_path / "mixed", dtype="bfloat16", shards=2)
    other = write_tiny_llama(tmp_path / "other", dtype="float32", shards=2)
    shutil.copy(other / "model-00002-of-00002.safetensors", mixed)
    assert refusal(mixed).params["types"] == "bfloat16, float32"
    with monkeypatch.context() as patch:
        patch.setattr(planning.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
        assert refusal(base).code == "files.no_space"
    with monkeypatch.context() as patch:
        patch.setattr(planning.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        assert refusal(base).code == "quantize.memory"
    assert require_plan(base, tmp_path / "target").can_start
