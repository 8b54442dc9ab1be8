"""FP8: the values against torch's own rounding, the folder against what its format asks, and transformers where the package is there."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.checkpoints.fp8_export import export_fp8
from core.checkpoints.shards import INDEX, read_folder
from core.errors import InputError
from core.runs.job import SilentProgress
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2

pytestmark = pytest.mark.engine
QUARTER_STEP = 2.0**-4
"""Half the distance of two neighbours in E4M3 (three bits after the first), relative to the value."""


@pytest.mark.parametrize(
    ("write", "dtype", "head"),
    [(write_tiny_llama, "bfloat16", "lm_head"), (write_tiny_qwen2, "float16", "lm_head"), (write_tiny_internlm2, "float32", "output")],
)  # fmt: skip
def test_linear_layers_are_rounded_once_and_all_else_is_as_it_was(
    write: Callable[..., Path], dtype: str, head: str, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    base = write(tmp_path / "base", dtype=dtype, shards=2)
    made = export_fp8(str(base), str(tmp_path / "base-fp8"), progress=SilentProgress())
    before = {name: value for file in base.glob("*.safetensors") for name, value in load_file(file).items()}
    folder = tmp_path / "base-fp8"
    after = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    converted = {name.removesuffix("_scale") for name in after.keys() - before.keys()}
    assert len(converted) == made["converted"] > 0
    assert not any(part in name for name in converted for part in ("embed", "norm", "lm_head", "output"))
    assert {name for name, value in before.items() if value.dim() == 2} - converted <= {
        "model.embed_tokens.weight", "model.tok_embeddings.weight", "lm_head.weight", "output.weight"
    }  # fmt: skip
    for name, value in before.items():
        if name not in converted:
            assert torch.equal(after[name], value), name
            continue
        scale, values = after[f"{name}_scale"], after[name]
        assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, value.dtype, (len(value), 1))
        restored = values.float() * scale.float()
        error = (restored - value.float()).abs()
        # Below the smallest normal number (2^-6) the steps are 2^-9, and a scale rounded down cuts off its own row's largest value.
        allowed = value.float().abs() * QUARTER_STEP + scale.float() * 2.0**-10
        assert bool((error <= allowed * 1.01).all()), name
    assert 0 < made["weight_error"] < 0.05
    assert set(json.loads((folder / INDEX).read_text())["weight_map"]) == after.keys()
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["format"], settings["ignore"]) == ("float-quantized", [head])


def test_rows_of_zeros_and_what_cannot_be_converted(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", dtype="bfloat16")
    tensor = read_folder(base)[0].tensors["model.layers.0.mlp.up_proj.weight"]
    with open(tensor.file, "r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(bytes(64 * 2))
    export_fp8(str(base), str(tmp_path / "zeros"), progress=SilentProgress())
    found = read_folder(tmp_path / "zeros")[0].tensors["model.layers.0.mlp.up_proj.weight"].read()
    assert not found[0].any()
    assert found[1].any()
    with open(tensor.file, "r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(np.array([0x7FC0], dtype="<u2").tobytes())
    with pytest.raises(InputError) as caught:
        export_fp8(str(base), str(tmp_path / "nan"), progress=SilentProgress())
    assert caught.value.code == "checkpoints.not_finite"
    config = json.loads((base / "config.json").read_text())
    for change, code in (
        ({"model_type": "gpt2"}, "fp8_architecture"),
        ({"quantization_config": {"a": 1}}, "quantized_base"),
    ):
        (base / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError) as caught:
            export_fp8(str(base), str(tmp_path / "other"), progress=SilentProgress())
        assert caught.value.code == f"checkpoints.{code}"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "zeros"}


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not required")
def test_transformers_loads_it_and_answers_nearly_the_same(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = write_tiny_llama(tmp_path / "base", dtype="bfloat16", shards=2)
    export_fp8(str(base), str(tmp_path / "base-fp8"), progress=SilentProgress())
    logits = []
    for name in ("base", "base-fp8"):
        model = AutoModelForCausalLM.from_pretrained(str(tmp_path / name), torch_dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            logits.append(model(input_ids=torch.arange(5, 60)[None]).logits.float())
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.15
