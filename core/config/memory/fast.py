"""What a run takes with the speed layer, which plans itself by what is free: its least need, and what it settles on.

The same arithmetic as core/xtuner/runtime/speed (apply, memory), from a shape in place of the built model; a test compares the two.
"""

from dataclasses import dataclass
from typing import Final

from core.config.memory.formula import Counts, buckets, packed_bytes, static
from core.config.memory.moments import Part
from core.config.memory.setup import Engine, Setup
from core.config.memory.shape import Shape
from core.xtuner.runtime.speed import parts

FAMILIES: Final = frozenset({"internlm2", "llama", "qwen2", "mistral"})
"""Models the speed layer knows; others take the stock path."""
_RESERVE: Final = 0.08
_UNPACKED_SHARE: Final = 0.15
_CHUNK_COPIES: Final = 3
_BLOCKS: Final = (4096, 2048, 1024, 512)
_TOKENS_PER_PASS: Final = 16384
_SMALL_PASS: Final = 8192
_PLANNED_FOR_TRAINED: Final = 12
"""Bytes of gradient and moments that the speed layer plans for each trained parameter, whoever holds them."""
_ITEM: Final = 2
"""Bytes of the arithmetic: the speed layer casts frozen weights once, to 16 bits."""


@dataclass(frozen=True, slots=True)
class FastPeak:
    """Bytes of a rank with the speed layer, static memory included."""

    least: int
    """With every layer computed again and one micro-batch in a pass; at least what the weights take before they are cast."""
    settled: int
    """What it plans for in the memory at hand; the least need where nothing more fits."""
    tokens: int
    """In a pass."""
    recomputed_layers: int
    parts: dict[Part, int]
    """Of `settled`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """As MemoryPlan of the speed layer."""

    expected_bytes: int
    recomputed_layers: int
    block_tokens: int


def fast_peak(shape: Shape, setup: Setup, counts: Counts, free_bytes: int) -> FastPeak:
    """`free_bytes`: on the device before anything of the run lies there."""
    free_bytes = min(free_bytes, setup.wish.memory_limit_bytes or free_bytes)
    lying = static(setup, counts)
    has_engine = setup.engine is Engine.DEEPSPEED
    held = _weights(shape, setup, counts) + round(lying.adapters)
    # Before anything is planned: DeepSpeed takes them with the first gradient.
    reduced = round(buckets(setup, counts)) if has_engine else 0
    free_bytes -= held + reduced
    unpacked = _unpacked(setup, counts, free_bytes)
    # The base comes to the device as peft made it, without DeepSpeed in float32, and is cast there.
    loading = round(lying.weights + lying.adapters)
    smallest = _passes(setup)[-1]
    least = held + reduced + needed(shape, setup, counts, smallest, recomputed=shape.layers, block=_BLOCKS[-1])
    tokens, chosen = _chosen(shape, setup, counts, free_bytes - unpacked)
    need = chosen.expected_bytes
    sizes = {
        Part.WEIGHTS: held - round(lying.adapters) + unpacked,
        Part.ADAPTERS: round(lying.adapters),
        Part.OPTIMIZER: round(lying.optimizer),
        Part.GRADIENTS: round(lying.gradients) if has_engine else 4 * counts.trained,
        Part.ACTIVATIONS: need - _PLANNED_FOR_TRAINED * counts.trained,
        Part.BUCKETS: reduced,
        Part.WORK: max(0, loading - held - unpacked - need),
    }
    return FastPeak(max(loading, least), sum(sizes.values()), tokens, chosen.recomputed_layers, sizes)


def _chosen(shape: Shape, setup: Setup, counts: Counts, free_bytes: int) -> tuple[int, Plan]:
    """Tokens and plan of the pass: the largest that need not compute layers twice, or is small enough for that to pay."""
    fewest = shape.layers if parts.RECOMPUTE not in setup.wish and setup.is_checkpointing else 0
    sizes = _passes(setup)
    for size in sizes:
        chosen = plan(shape, setup, counts, size, free_bytes, fewest=fewest)
        if chosen and (chosen.recomputed_layers == fewest or size <= _SMALL_PASS or size == sizes[-1]):
            return size, chosen
    least = needed(shape, setup, counts, sizes[-1], recomputed=shape.layers, block=_BLOCKS[-1])
    return sizes[-1], Plan(least, shape.layers, _BLOCKS[-1])


def _unpacked(setup: Setup, counts: Counts, free_bytes: int) -> int:
    """4-bit weights that the speed layer keeps unpacked beside the packed ones, where they take a small share of what is free."""
    size = counts.linear * _ITEM
    is_kept = setup.method == "qlora" and parts.UNPACKED in setup.wish and size <= _UNPACKED_SHARE * free_bytes
    return size if is_kept else 0


def plan(shape: Shape, setup: Setup, counts: Counts, tokens: int, free_bytes: int, *, fewest: int = 0) -> Plan | None:
    """How passes of `tokens` fit within `free_bytes` beyond the static memory, or None."""
    budget = int(free_bytes * (1 - _RESERVE))
    for block in _BLOCKS:
        logits = _CHUNK_COPIES * min(block, tokens) * shape.vocabulary * _ITEM
        for count in range(fewest, shape.layers + 1):
            need = needed(shape, setup, counts, tokens, recomputed=count, block=block)
            if need <= budget and (count == fewest or block <= 1024 or need + logits <= budget):
                return Plan(need, count, block)
    return None


def needed(shape: Shape, setup: Setup, counts: Counts, tokens: int, *, recomputed: int, block: int) -> int:
    """Bytes beyond what lies there always: gradients, moments and 16-bit copies of the adapters, and the pass itself."""
    hidden, width = shape.hidden, 2 * shape.intermediate
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_width
    ranks = setup.rank * sum(m.count for m in shape.matrices if setup.has_adapter(m.name)) // shape.layers
    kept = (
        2 * hidden * (counts.residual + _ITEM)
        + _ITEM * (heads + shape.attention_width + width + ranks)
        + 4 * shape.heads
    )
    trained = counts.trained * (_PLANNED_FOR_TRAINED + _ITEM)
    unpacked = hidden * max(heads, width) * _ITEM if setup.method == "qlora" else 0
    in_backward = tokens * _ITEM * (2 * width + 6 * hidden) + 2 * unpacked
    logits = _CHUNK_COPIES * min(block, tokens) * shape.vocabulary * _ITEM
    fixed = trained + max(in_backward, logits) + tokens * hidden * 3 * _ITEM
    again = kept * tokens if recomputed else 0
    return fixed + tokens * (kept * (shape.layers - recomputed) + hidden * counts.residual * recomputed) + again


def _weights(shape: Shape, setup: Setup, counts: Counts) -> int:
    """Frozen matrices in 16 bits or packed; embedding and norms in float32, as peft lifts them, but with DeepSpeed in 16 bits."""
    heads = 1 if shape.is_tied else 2
    linear = counts.linear * (packed_bytes(setup) if setup.method == "qlora" else _ITEM)
    head = 0 if shape.is_tied else counts.head * _ITEM
    norms = max(0, counts.base - counts.linear - counts.head * heads) * counts.residual
    return round(linear + counts.head * counts.residual + head + norms)


def _passes(setup: Setup) -> list[int]:
    """Tokens of the passes that are tried, the largest first: whole micro-batches that divide the accumulation."""
    counts, target = range(1, setup.accumulation + 1), setup.wish.tokens_per_pass or _TOKENS_PER_PASS
    if parts.GROUPED not in setup.wish:
        return [setup.tokens]
    groups = {n for n in counts if setup.accumulation % n == 0 and n * setup.tokens <= target}
    return [count * setup.tokens for count in sorted({1, *groups}, reverse=True)]
