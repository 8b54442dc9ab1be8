"""How much of the GPUs' arithmetic a training run uses (MFU). Knows formulas and data sheets; measures nothing.

FLOPs a token, after PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the forward pass takes 2 N + 4 L h s, the backward
pass twice that. LoRA computes no gradients of the frozen weights: a token takes 4 N + 12 L h s in all. N: parameters, L: layers,
h: hidden size, s: tokens a sequence. The adapters themselves are left out (< 2 %), recomputed activations too: they are work, but no
progress. As in the paper, attention is counted as if every token saw every other, and a causal mask saves nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_PEAK_TERAFLOPS: Final = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800 PCIe", 756.0),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("5090", 209.5),
    ("4090", 165.2),
    ("4080 SUPER", 104.4),
    ("4080", 97.5),
    ("3090 Ti", 80.0),
    ("3090", 71.0),
    ("3080", 59.5),
    ("V100", 125.0),
    ("T4", 65.0),
)
"""Model in the card's name → dense 16-bit TFLOP/s. The first that fits.

From NVIDIA's data sheets and architecture papers (Hopper 2022, Ampere GA100 2020 and GA102 2021, Ada 2022, Blackwell 2025): the
figure of bf16 tensor cores without sparsity, which data sheets of newer cards print as half of the one "with sparsity", and with
32-bit accumulation, which is how training multiplies. GeForce cards do that at half the rate that is advertised for 16-bit
accumulation (RTX 4090: 165.2, not 330). SXM modules, unless the name says PCIe or NVL.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the formula needs to know of a model."""

    parameters: int
    layers: int
    hidden: int


def shape_of(config: Mapping[str, Any], parameters: int | None) -> Shape | None:
    """From a model's config.json; None if it does not say."""
    layers = config.get("num_hidden_layers") or config.get("num_layers")
    hidden = config.get("hidden_size")
    if not parameters or not isinstance(layers, int) or not isinstance(hidden, int):
        return None
    return Shape(parameters, layers, hidden)


def flops_per_token(shape: Shape, sequence_tokens: int, *, is_full: bool) -> float:
    """Forward and backward pass of one token. is_full: all weights are trained, not adapters."""
    weights = 2 * shape.parameters
    attention = 4 * shape.layers * shape.hidden * sequence_tokens
    forward = weights + attention
    return float(3 * forward if is_full else 2 * weights + 3 * attention)


def peak_flops(gpu_name: str) -> float | None:
    """Dense 16-bit FLOP/s of a card by its name; None if it is not in the list."""
    for model, teraflops in _PEAK_TERAFLOPS:
        if re.search(rf"(?<![0-9A-Za-z]){model}(?![0-9])", gpu_name):
            return teraflops * 1e12
    return None


def mfu(tokens_per_second: float, token_flops: float, gpu_names: list[str]) -> float | None:
    """Model FLOPs utilisation of all GPUs together, 0 to 1; None without a GPU whose peak is known."""
    peaks = [peak_flops(name) for name in gpu_names]
    if not peaks or None in peaks:
        return None
    return tokens_per_second * token_flops / sum(filter(None, peaks))
