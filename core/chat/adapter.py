"""A LoRA adapter (PEFT format) laid out for our decoder: pairs of A and B per Llama module. Does not merge anything."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from core.chat import internlm2
from core.chat.weights import DecoderConfig
from core.errors import InputError
from core.files import read_json

_PLAIN: Final = re.compile(r"\.lora_[AB]\.weight$|\.(lm_head|embed_tokens)(\.base_layer)?\.weight$")
"""PEFT saves an unchanged copy of the base's head with an adapter that has a pair on it; the pair is what counts."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """`y += B @ (A @ x)`; the scale alpha/r is already in B."""

    a: torch.Tensor
    """(rank, in)"""
    b: torch.Tensor
    """(out, rank)"""


def read_adapter(
    folder: Path, config: DecoderConfig, dtype: torch.dtype, device: torch.device, *, is_internlm2: bool
) -> dict[str, LowRank]:
    """Llama module name → pair.

    Raises InputError `chat.adapter_unsupported` for what is no plain LoRA on linear layers (DoRA, whole saved modules,
    embeddings, biases): such an adapter can still be merged.
    """
    settings = read_json(folder / "adapter_config.json")
    state = _read_state(folder)
    odd = _odd(settings, state)
    if odd:
        raise InputError("chat.adapter_unsupported", path=str(folder), reason=odd)
    pairs: dict[str, LowRank] = {}
    for key in (key for key in state if key.endswith(".lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a = state[key].to(device, torch.float32)
        b = state[key.replace(".lora_A.", ".lora_B.")].to(device, torch.float32) * _scale(settings, module, a.shape[0])
        names = internlm2.llama_module(module) if is_internlm2 else (module,)
        if not names:
            raise InputError("chat.adapter_unsupported", path=str(folder), reason=module)
        parts = internlm2.split_wqkv(b, config) if len(names) == 3 else (b,)
        for name, part in zip(names, parts, strict=True):
            pairs[name] = LowRank(a.to(dtype), part.contiguous().to(dtype))
    return pairs


def _read_state(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        from safetensors.torch import load_file

        return dict(load_file(file))
    old = folder / "adapter_model.bin"
    if old.is_file():
        return dict(torch.load(old, map_location="cpu", weights_only=True))
    raise InputError("chat.no_weights", path=str(folder), missing=file.name)


def _odd(settings: dict[str, Any], state: dict[str, torch.Tensor]) -> str | None:
    if settings.get("peft_type", "LORA") != "LORA":
        return str(settings["peft_type"])
    if settings.get("use_dora"):
        return "DoRA"
    if settings.get("fan_in_fan_out"):
        return "fan_in_fan_out"
    return next((key for key in state if not _PLAIN.search(key)), None)


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """alpha/r, or alpha/sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732); patterns as PEFT matches them."""
    alpha = float(settings.get("lora_alpha", rank))
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = float(value)
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
