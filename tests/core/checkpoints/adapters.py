"""Adapters with random values, made by peft on tiny models: what peft's own arithmetic says of them is the oracle."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.checkpoints.shards import read_folder
from core.checkpoints.tensors import narrow, widen
from tests.models import VOCABULARY, write_tokenizer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other far longer than a tiny model computes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tiny_gpt2(folder: Path, **_: Any) -> Path:
    """A GPT-2, whose Conv1D weights lie in × out: what fan_in_fan_out is for."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, initializer_range=0.1, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def load(folder: Path) -> Any:
    """The model in float32, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from core.xtuner.runtime.compat import patch_caches

    patch_caches()
    return AutoModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.float32, trust_remote_code=True).eval()


def make_adapter(base: Path, folder: Path, *, seed: int = 1, dtype: str = "float32", **options: Any) -> Path:
    """A PEFT folder as peft writes it, every trained value random and none zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings, fan_in_fan_out: told to people, not to tests
        defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": LINEAR}
        model = get_peft_model(load(base), LoraConfig(**{**defaults, **options}))
        generator = torch.Generator().manual_seed(seed)
        for name, value in model.named_parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=generator) * 0.1
                value.data = (value.data + 0.5 * noise.abs() if "magnitude" in name else noise).to(value.dtype)
        model.to(getattr(torch, dtype)).save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_model(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base), str(adapter)).eval()


def peft_merge(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What merge_and_unload gives, in float32, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft_model(base, adapter).merge_and_unload()
    return {name: value.detach().float().numpy() for name, value in merged.state_dict().items()}


def read_model(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and bits of every tensor of a model folder."""
    return {
        name: (tensor.dtype, tensor.read()) for shard in read_folder(folder) for name, tensor in shard.tensors.items()
    }


def steps_apart(found: dict[str, tuple[str, np.ndarray]], expected: dict[str, np.ndarray]) -> float:
    """Largest difference between `found` and the float32 values `expected`, in rounding steps of the type they are stored in.

    Where W and its update nearly cancel, the step is float32's at the tensor's largest value: both sides add in float32, in
    another order.
    """
    worst = 0.0
    for name, (dtype, bits) in found.items():
        target = np.ascontiguousarray(expected[name], dtype=np.float32)
        assert bits.shape == target.shape, name
        rounded = np.abs(widen(narrow(target, dtype), dtype))
        steps = np.maximum(_step(rounded, dtype), 4 * np.spacing(rounded.max()))
        worst = max(worst, float((np.abs(widen(bits, dtype) - widen(narrow(target, dtype), dtype)) / steps).max()))
    return worst


def _step(values: np.ndarray, dtype: str) -> np.ndarray:
    """Distance of each float32 value to the next one of `dtype`."""
    step = np.spacing(values)
    return step * 2.0 ** {"F32": 0, "BF16": 16, "F16": 13}[dtype]
