"""A model folder's weights in one layout for our decoder: Llama's names, whatever the family. Knows files and names, no arithmetic.

Families with Llama's block are read straight from their files, InternLM2 too, without running the folder's own code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from core.chat import internlm2
from core.errors import InputError
from core.files import read_json

_FAMILIES: Final = frozenset({"llama", "mistral", "qwen2", "qwen3", "internlm2"})
_ROPES: Final = frozenset({"default", "linear", "llama3", "dynamic"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What the decoder must know of a model, in Llama's words."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    max_positions: int
    tied: bool
    rope: dict[str, Any]
    """`rope_theta`, `rope_scaling` as transformers' config has them."""


def read_config(folder: Path) -> DecoderConfig | None:
    """The configuration if our decoder can run the model exactly, else None (another family, sliding window, odd RoPE)."""
    value = read_json(folder / "config.json")
    family = value.get("model_type")
    scaling = value.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if (
        family not in _FAMILIES
        or kind not in _ROPES
        or value.get("hidden_act", "silu") != "silu"
        or (value.get("sliding_window") and value.get("use_sliding_window", family == "mistral"))
        or value.get("quantization_config")
    ):
        return None
    heads = int(value["num_attention_heads"])
    return DecoderConfig(
        vocabulary=int(value["vocab_size"]),
        hidden=int(value["hidden_size"]),
        layers=int(value["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(value.get("num_key_value_heads") or heads),
        head_dim=int(value.get("head_dim") or value["hidden_size"] // heads),
        norm_epsilon=float(value.get("rms_norm_eps", 1e-6)),
        max_positions=int(value.get("max_position_embeddings", 2048)),
        tied=bool(value.get("tie_word_embeddings", False)),
        # Dynamic NTK equals plain RoPE up to max_position_embeddings, and the engine lets no conversation grow beyond it.
        rope={
            "rope_theta": value.get("rope_theta", 10000.0),
            "rope_scaling": None if kind == "dynamic" else scaling or None,
        },
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises InputError `chat.no_weights` if there are none or one is missing."""
    for pattern in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / pattern
        if index.is_file():
            files = sorted({folder / str(name) for name in read_json(index)["weight_map"].values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise InputError("chat.no_weights", path=str(folder), missing=", ".join(missing))
            return files
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError("chat.no_weights", path=str(folder), missing="*.safetensors")
    return files


def tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model under its own name, one at a time, on the CPU."""
    from safetensors import safe_open

    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as reader:
                for name in list(reader.keys()):
                    yield name, reader.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()


def read_weights(
    folder: Path, dtype: torch.dtype, device: torch.device, loaded: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Llama's names → tensors of `dtype` on `device`. `loaded(bytes)` is called after each tensor with its size on disk."""
    family = read_json(folder / "config.json").get("model_type")
    config = read_config(folder)
    assert config is not None
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors(weight_files(folder)):
        named = internlm2.llama_tensors(name, tensor, config) if family == "internlm2" else {name: tensor}
        for llama_name, part in named.items():
            found[llama_name] = part.to(device=device, dtype=dtype)
        loaded(tensor.numel() * tensor.element_size())
    return found
