"""How near memory bandwidth each matrix of a decoding step comes, for some ways to cut it: `python -m benchmarks.generation.tune`.

Prints one line a matrix and cut. What is best here is what `core.chat.kernels.choose_blocks` should say.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from benchmarks.training.case import SHAPES
from core.chat.kernels import Blocks, matvec

_CUTS: Final = (
    Blocks(1, 1024, 4), Blocks(2, 1024, 4), Blocks(4, 1024, 4), Blocks(8, 512, 4), Blocks(2, 2048, 8), Blocks(4, 512, 4),
    Blocks(16, 256, 4),
)  # fmt: skip
_COPIES: Final = 12
"""Matrices read in turn, so that the card's cache holds none of them."""


def main(shape: str) -> int:
    if not torch.cuda.is_available():
        print("needs an NVIDIA GPU", file=sys.stderr)
        return 2
    sizes = SHAPES[shape]
    hidden, width = sizes["hidden"], sizes["width"]
    head = hidden // sizes["heads"]
    matrices = {
        "qkv": (hidden + 2 * sizes["kv_heads"] * head, hidden, False),
        "out": (hidden, hidden, False),
        "gate_up": (2 * width, hidden, True),
        "down": (hidden, width, False),
        "head": (sizes["vocabulary"], hidden, False),
    }
    for name, (outputs, inputs, is_gated) in matrices.items():
        copies = 2 if name == "head" else _COPIES
        weights = [torch.randn(outputs, inputs, device="cuda").bfloat16() for _ in range(copies)]
        x = torch.randn(1, inputs, device="cuda").bfloat16()
        norm = torch.ones(inputs, device="cuda").bfloat16()
        size = copies * outputs * inputs * 2
        plain = _seconds(partial(_linear, x, weights))
        print(f"{name}: torch linear {1e6 * plain / copies:.1f} us, {size / plain / 1e12:.2f} TB/s", flush=True)
        for cut in _CUTS:
            seconds = _seconds(partial(_matvec, x, weights, norm, is_gated=is_gated, cut=cut))
            print(f"{name}: {cut} {1e6 * seconds / copies:.1f} us, {size / seconds / 1e12:.2f} TB/s", flush=True)
    return 0


def _linear(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        torch.nn.functional.linear(x, weight)


def _matvec(x: torch.Tensor, weights: list[torch.Tensor], norm: torch.Tensor, *, is_gated: bool, cut: Blocks) -> None:
    for weight in weights:
        matvec(x, weight, norm=norm, epsilon=1e-5, is_gated=is_gated, blocks=cut)


def _seconds(step: Callable[[], object]) -> float:
    """Of one call, replayed as a graph: launching takes longer than these kernels."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(20):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / 20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if sys.argv[1:] else "1.8b"))
