"""InternLM2 is Llama with its query, key and value weights interleaved: renames and splits them, losing nothing.

`wqkv` has, for each key-value head, the rows of its query heads, then of the key, then of the value.
Source: InternLM2 technical report (arXiv 2403.17297) §2.2 and the modeling file on the hub.
"""

import re
from typing import Final, Protocol

import torch

_NAMES: Final = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS: Final = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class Heads(Protocol):
    """The numbers that say how `wqkv` is interleaved."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def llama_tensors(name: str, tensor: torch.Tensor, config: Heads) -> dict[str, torch.Tensor]:
    """The Llama tensors that the InternLM2 tensor `name` holds: three for `wqkv`, one for all else, none for what is derived."""
    if name in _NAMES:
        return {_NAMES[name]: tensor}
    match = _LAYER.fullmatch(name)
    if match is None:
        return {}
    layer, part, kind = match.groups()
    prefix = f"model.layers.{layer}"
    if part == "attention.wqkv":
        names = ("q_proj", "k_proj", "v_proj")
        return {
            f"{prefix}.self_attn.{each}.{kind}": rows
            for each, rows in zip(names, split_wqkv(tensor, config), strict=True)
        }
    return {f"{prefix}.{_PARTS[part]}.{kind}": tensor} if part in _PARTS else {}


def split_wqkv(rows: torch.Tensor, config: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value rows of `wqkv`: a weight (out, in), a bias (out,), or the `B` of an adapter (out, rank)."""
    groups = config.heads // config.kv_heads
    shaped = rows.reshape(config.kv_heads, groups + 2, config.head_dim, *rows.shape[1:])
    query = shaped[:, :groups].reshape(-1, *rows.shape[1:])
    key = shaped[:, -2].reshape(-1, *rows.shape[1:])
    value = shaped[:, -1].reshape(-1, *rows.shape[1:])
    return query, key, value


def llama_module(module: str) -> tuple[str, ...]:
    """The Llama modules behind an InternLM2 module name as adapters use it; three for `wqkv`."""
    if module == "output":
        return ("lm_head",)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match is None:
        return ()
    layer, part = match.groups()
    if part == "attention.wqkv":
        return tuple(f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv")
    return (f"model.layers.{layer}.{_PARTS[part]}",) if part in _PARTS else ()
