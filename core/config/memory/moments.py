"""The four moments a training may peak at, and the parts of the memory at the worst of them."""

from dataclasses import dataclass
from enum import StrEnum

from core.config.memory import formula
from core.config.memory.formula import Counts, Static
from core.config.memory.setup import Attention, Engine, Setup
from core.config.memory.shape import Shape


class Moment(StrEnum):
    FORWARD = "forward"
    LOSS = "loss"
    LAYER = "layer"
    STEP = "step"


class Part(StrEnum):
    """Of the bar, from the bottom."""

    WEIGHTS = "weights"
    ADAPTERS = "adapters"
    OPTIMIZER = "optimizer"
    GRADIENTS = "gradients"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    BUCKETS = "buckets"
    WORK = "work"


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes by part at the worst moment."""

    moment: Moment
    parts: dict[Part, int]
    moments: dict[Moment, int]
    """Total of each moment."""

    @property
    def total(self) -> int:
        return self.moments[self.moment]


def peak(shape: Shape, setup: Setup) -> Peak:
    """The peak of `torch.cuda.max_memory_allocated` of one rank on the stock path."""
    counts = formula.count(shape, setup)
    held = formula.static(setup, counts)
    kept = _kept_activations(shape, setup, counts)
    moments = {
        Moment.FORWARD: _forward(shape, setup, counts, kept),
        Moment.LOSS: _loss(shape, setup, counts, kept),
        Moment.LAYER: _layer(shape, setup, counts, kept),
        Moment.STEP: _step(setup, counts, held),
    }
    static = {
        Part.WEIGHTS: held.weights,
        Part.ADAPTERS: held.adapters,
        Part.OPTIMIZER: held.optimizer,
        Part.GRADIENTS: held.gradients,
    }
    whole = {name: {**static, **parts} for name, parts in moments.items()}
    totals = {name: round(sum(parts.values()) + formula.workspace()) for name, parts in whole.items()}
    worst = max(totals, key=lambda name: totals[name])
    parts = {part: round(size) for part, size in whole[worst].items()}
    parts[Part.WORK] = parts.get(Part.WORK, 0) + round(formula.workspace())
    return Peak(worst, parts, totals)


def _kept_activations(shape: Shape, setup: Setup, counts: Counts) -> float:
    """What the layers keep at the end of the forward pass."""
    checkpoint = counts.residual * setup.tokens * shape.hidden
    if setup.is_checkpointing:
        return checkpoint * (shape.layers + 1)
    # Without checkpoints a 16-bit residual is not kept at all: the norms keep their float32 copies.
    own_input = checkpoint if counts.residual == 4 else 0
    return shape.layers * (setup.tokens * counts.layer_token_bytes + counts.layer_fixed_bytes + own_input)


def _tail(shape: Shape, setup: Setup, counts: Counts) -> float:
    """Final norm, and input and weight of the output head as it is kept for the backward pass."""
    tokens, hidden = setup.tokens, shape.hidden
    drops = counts.has_head_adapter and setup.dropout > 0
    if counts.residual == 2:
        return tokens * hidden * (6 + (3 if drops else 2))
    cast = counts.compute * counts.head if counts.compute == 2 else 0
    adapter = 2 * setup.rank * shape.vocabulary if counts.has_head_adapter else 0
    return tokens * hidden * (4 + counts.compute + drops) + cast + adapter


def _cached(setup: Setup, counts: Counts) -> float:
    """Autocast's cache of trained weights lives to the end of the forward pass, beside checkpointed layers."""
    if (counts.residual, counts.compute) != (4, 2) or not setup.is_checkpointing:
        return 0.0
    if setup.is_adapted:
        return 2.0 * counts.trained
    return 2.0 * counts.linear


def _forward(shape: Shape, setup: Setup, counts: Counts, kept: float) -> dict[Part, float]:
    return {
        Part.ACTIVATIONS: kept + _tail(shape, setup, counts) + _cached(setup, counts),
        Part.LOGITS: setup.tokens * formula.logits_bytes(shape, setup),
    }


def _loss(shape: Shape, setup: Setup, counts: Counts, kept: float) -> dict[Part, float]:
    """log-softmax, its gradient and the one before it: three float32 copies of the logits.

    DeepSpeed makes its buckets later, with the first trained parameter's gradient (0.19.6, `setup_buckets`).
    """
    return {
        Part.ACTIVATIONS: kept + _tail(shape, setup, counts),
        Part.LOGITS: 12.0 * setup.tokens * shape.vocabulary,
        Part.BUCKETS: 0.0 if setup.engine is Engine.DEEPSPEED else formula.buckets(setup, counts),
    }


def _layer(shape: Shape, setup: Setup, counts: Counts, kept: float) -> dict[Part, float]:
    tokens = setup.tokens
    work = tokens * counts.work_token_bytes
    if setup.method == "qlora" and setup.engine is Engine.DEEPSPEED:
        work += 2 * shape.hidden * shape.intermediate  # one matrix, unpacked
    if setup.is_checkpointing:
        work += tokens * counts.layer_token_bytes + counts.layer_fixed_bytes
    if setup.attention is Attention.EAGER:
        # Scores and two gradients of them, in float32.
        scores = tokens * (15 * shape.hidden + 12 * shape.heads * setup.length) + counts.layer_fixed_bytes
        work = max(work, scores)
    new = 0.0 if setup.is_offloaded else _new_gradients(setup, counts)
    return {
        Part.ACTIVATIONS: kept,
        Part.WORK: work + new,
        Part.BUCKETS: formula.buckets(setup, counts),
    }


def _new_gradients(setup: Setup, counts: Counts) -> float:
    """ZeRO-1 keeps this micro-step's beside the accumulated ones; torch adds in place, so that only the first ones are new.

    From ZeRO-2 on each moves into a bucket as it comes (DeepSpeed 0.19.6).
    """
    if setup.engine is Engine.DEEPSPEED:
        return 2.0 * counts.trained if setup.stage < 2 else 0.0
    if setup.accumulation > 1:
        return 0.0
    return float(counts.trained * _trained_bytes(setup))


def _trained_bytes(setup: Setup) -> int:
    return 2 if setup.method == "full" and setup.weights != "float32" else 4


def _step(setup: Setup, counts: Counts, held: Static) -> dict[Part, float]:
    """torch's AdamW takes the square roots of all second moments at once (foreach)."""
    if setup.engine is Engine.DEEPSPEED:
        shard = setup.world_size if setup.stage else 1
        fresh = 0.0 if setup.is_offloaded else 8.0 * counts.trained / shard
        return {Part.GRADIENTS: 0.0, Part.WORK: fresh}
    size = float(counts.trained * _trained_bytes(setup))
    return {
        Part.GRADIENTS: size,
        Part.WORK: size,
        Part.BUCKETS: formula.buckets(setup, counts) if held.gradients else 0.0,
    }
