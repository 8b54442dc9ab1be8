"""A Hugging Face model as llama.cpp lays it out: names, metadata, order of rows. Knows Llama, Mistral, Qwen2, Qwen3 and InternLM2.

InternLM2 is a Llama whose q, k and v lie in one tensor, so it is written as one (llama.cpp's and Ollama's oldest architecture). llama.cpp
turns neighbouring pairs in its Llama rotary embedding, Hugging Face the two halves of a head: the rows of q and k are put in its order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.shards import read_folder
from core.checkpoints.tensors import DiskTensor
from core.errors import InputError
from core.files import read_json

_ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "internlm2": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NEW_NAMES: Final = {  # InternLM2's names → Llama's
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What config.json says of the shape."""

    model_type: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int

    @property
    def architecture(self) -> str:
        return _ARCHITECTURES[self.model_type]


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of the GGUF file: its name there, where its values lie, which of the source's rows they are."""

    name: str
    source: DiskTensor
    rows: Rows | None = None
    """Source row of each row; None: all of them in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.rows is None else (len(self.rows), *self.source.shape[1:])


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Raises InputError `checkpoints.gguf_architecture`, `checkpoints.gguf_rope`, `checkpoints.quantized_base`."""
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise InputError("checkpoints.gguf_architecture", architecture=kind, known=", ".join(_ARCHITECTURES))
    scaling = config.get("rope_scaling") or {}
    if str(scaling.get("rope_type", scaling.get("type", "default"))) not in ("default", "linear", "dynamic", "llama3"):
        raise InputError("checkpoints.gguf_rope", scaling=str(scaling))
    if config.get("sliding_window") and config.get("use_sliding_window", kind == "mistral"):
        raise InputError(
            "checkpoints.gguf_architecture", architecture=f"{kind}, sliding window", known=", ".join(_ARCHITECTURES)
        )
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_width = int(config.get("head_dim") or width // heads)
    return Sizes(kind, int(config["num_hidden_layers"]), width, heads, kv_heads, head_width)


def add_metadata(writer: Any, config: Mapping[str, Any], sizes: Sizes, name: str) -> None:
    """The model's shape as llama.cpp reads it. `writer`: gguf.GGUFWriter."""
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(sizes.width)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(sizes.head_width)
    if sizes.head_width * sizes.heads != sizes.width:
        writer.add_key_length(sizes.head_width)
        writer.add_value_length(sizes.head_width)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def rope_factors(config: Mapping[str, Any], sizes: Sizes) -> NDArray[np.float32] | None:
    """Divisors of the rotary frequencies that Llama 3.1 stretches (transformers' `_compute_llama3_parameters`); None for all others."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return None
    wavelengths = (
        2 * np.pi * float(config.get("rope_theta", 10000.0)) ** (np.arange(0, sizes.head_width, 2) / sizes.head_width)
    )
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(scaling["original_max_position_embeddings"])
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), dtype=np.float32)


def place_tensors(folder: Path, config: Mapping[str, Any], sizes: Sizes) -> list[Placed]:
    """Every tensor of the model, in the file's order. Raises InputError `checkpoints.gguf_tensor` for one that has no place there."""
    import gguf

    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[sizes.architecture]
    table = gguf.get_tensor_name_map(kind, sizes.layers)
    is_tied = bool(config.get("tie_word_embeddings"))
    found = []
    for shard in read_folder(folder):
        for name, source in shard.tensors.items():
            for new_name, rows in _rename(name, source, sizes):
                placed = table.get_name(new_name, try_suffixes=(".weight", ".bias"))
                if "rotary_emb" in new_name or (is_tied and new_name == "lm_head.weight"):
                    continue
                if placed is None:
                    raise InputError("checkpoints.gguf_tensor", name=name, path=str(folder))
                found.append(Placed(placed, source, rows))
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model in 16 or 32 bits."""
    config: dict[str, Any] = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise InputError("checkpoints.quantized_base", path=str(folder))
    return config


def _rename(name: str, source: DiskTensor, sizes: Sizes) -> Iterator[tuple[str, Rows | None]]:
    """Llama's name(s) for a tensor, and its rows in llama.cpp's order."""
    if sizes.model_type == "internlm2":
        if ".attention.wqkv." in name:
            for part, rows in _split_qkv(sizes).items():
                yield name.replace("attention.wqkv", f"self_attn.{part}_proj"), rows
            return
        for old, new in _NEW_NAMES.items():
            if name.startswith(f"{old}.") or f".{old}." in name:
                name = name.replace(old, new)
                break
    if sizes.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        yield name, _paired(np.arange(source.shape[0]), sizes.head_width)
    else:
        yield name, None


def _split_qkv(sizes: Sizes) -> dict[str, Rows]:
    """Rows of InternLM2's wqkv: for each key head its query heads, then the key, then the value."""
    group = sizes.heads // sizes.kv_heads
    rows = np.arange((sizes.heads + 2 * sizes.kv_heads) * sizes.head_width)
    by_head = rows.reshape(sizes.kv_heads, group + 2, sizes.head_width)
    parts = {"q": by_head[:, :group], "k": by_head[:, group], "v": by_head[:, group + 1]}
    flat = {part: np.ascontiguousarray(value).reshape(-1) for part, value in parts.items()}
    return {part: value if part == "v" else _paired(value, sizes.head_width) for part, value in flat.items()}


def _paired(rows: Rows, head_width: int) -> Rows:
    """Rows of each head with its two halves interleaved."""
    return rows.reshape(-1, 2, head_width // 2).swapaxes(1, 2).reshape(-1)
