"""The formula: bytes of one rank by part and by moment, from a model's shape and a training's setup. Plain arithmetic.

T tokens of a micro-batch, H hidden, A attention width, I intermediate, V vocabulary, L layers, e bytes of the residual stream, h bytes
of a matrix product's operands. A training peaks at one of four moments: the end of the forward pass (logits), the backward pass of
the loss, that of a layer, and the optimizer's step.

Sources. QLoRA: Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314), section 3: 4 bits, a constant for 64 weights, constants
quantised again for 256. ZeRO: Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054), section 3: 12 bytes of optimizer state for
a trained 16-bit parameter, divided by ranks. Checkpointing: Chen et al. 2016 (https://arxiv.org/abs/1604.06174). What a layer keeps
is read from the modules themselves: xtuner 0.2.0 (model/sft.py), peft's prepare_model_for_kbit_training, InternLM2's modeling
file, torch's autocast. Checked against dry runs on fake tensors (autocast) and seven measurements on an H100 (DeepSpeed).
"""

from dataclasses import dataclass
from typing import Final

from core.config.memory.setup import Attention, Engine, Setup
from core.config.memory.shape import Shape

MIB: Final = 2**20
_WORKSPACE: Final = 64 * MIB
"""cuBLAS's workspaces and the batch itself."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters, and what a layer keeps."""

    base: int
    trained: int
    linear: int
    head: int
    """Of the output head's matrix, tied or not."""
    layer_token_bytes: float
    layer_fixed_bytes: float
    """Copies of weights that the backward pass of a layer needs."""
    work_token_bytes: float
    residual: int
    compute: int
    has_head_adapter: bool


def count(shape: Shape, setup: Setup) -> Counts:
    """Everything the moments are made of."""
    adapted = [m for m in shape.matrices if setup.has_adapter(m.name)]
    # XTuner looks for all linear layers but `lm_head`; InternLM2 calls its head `output`.
    has_head = setup.has_adapter(shape.head_name) and not (setup.targets is None and shape.head_name == "lm_head")
    in_layers = sum((m.inputs + m.outputs) * m.count for m in adapted) * setup.rank
    in_head = (shape.hidden + shape.vocabulary) * setup.rank if has_head else 0
    residual, compute = _bytes(setup)
    inputs = sum(m.inputs * m.count for m in adapted) / shape.layers
    return Counts(
        base=shape.parameters,
        trained=in_layers + in_head if setup.is_adapted else shape.parameters,
        linear=shape.linear_parameters,
        head=shape.vocabulary * shape.hidden,
        layer_token_bytes=_layer_tokens(shape, setup, inputs, sum(m.count for m in adapted) / shape.layers),
        layer_fixed_bytes=_layer_fixed(shape, setup, in_layers / shape.layers),
        work_token_bytes=_work(shape, setup),
        residual=residual,
        compute=compute,
        has_head_adapter=has_head,
    )


def _bytes(setup: Setup) -> tuple[int, int]:
    """Of the residual stream and of matrix products. Peft lifts a LoRA base to float32, and with it embedding and residuals."""
    if setup.engine is Engine.DEEPSPEED:
        return 2, 2
    is_wide = setup.is_adapted or setup.weights == "float32"
    return (4, 4 if setup.engine is Engine.PLAIN else 2) if is_wide else (2, 2)


def _layer_tokens(shape: Shape, setup: Setup, inputs: float, adapters: float) -> float:
    """Bytes a layer keeps for each token, its own input (the checkpoint) left out. `inputs`: summed over adapters."""
    h, i, a = shape.hidden, shape.intermediate, shape.attention_width
    residual, compute = _bytes(setup)
    is_full, drops = not setup.is_adapted, setup.is_adapted and setup.dropout > 0
    products = sum(m.count for m in shape.matrices if m.inputs == h) / shape.layers - (shape.attention_width == h)
    if residual == 4:
        # The residual between the two blocks; trained norms keep their normalised input, trained products a cast of theirs.
        norms = 4 * h + ((8 * h + compute * products * h) if is_full else 0)
        adapted = 0 if is_full else (1 + compute) * inputs if drops else compute * inputs
    else:
        # float32 copies inside the two norms; products share their 16-bit outputs.
        norms = 8 * h + (8 * h if is_full else 0 if drops else 4 * h)
        adapted = 3 * inputs if drops else 0
    # flash-attn takes keys and values as they are, sdpa repeats them to the number of heads.
    keys = shape.kv_heads * shape.head_width if setup.attention is Attention.FLASH else a
    attention: float = compute * (2 * a + 2 * keys)
    if setup.attention is Attention.EAGER:
        attention += 6 * shape.heads * setup.length
    # bitsandbytes gives its products back in the dtype they came in: float32 under autocast.
    element = 4 if setup.method == "qlora" and residual == 4 else compute
    is_kept_again = is_full or (not drops and residual == 2)
    gate = 3 * element * i + (compute * i if is_kept_again else 0)
    ranks = compute * setup.rank * adapters if setup.is_adapted else 0
    return norms + adapted + attention + gate + ranks + 4 * shape.heads + 8 + 4 * shape.head_width


def _layer_fixed(shape: Shape, setup: Setup, adapter_parameters: float) -> float:
    """Autocast's 16-bit copies of float32 weights; a product keeps the one it used for its backward pass."""
    if _bytes(setup) != (4, 2):
        return 0.0
    if setup.method == "full":
        return 2 * shape.linear_parameters / shape.layers
    frozen = shape.linear_parameters / shape.layers if setup.method == "lora" else 0
    return 2 * (frozen + adapter_parameters)


def _work(shape: Shape, setup: Setup) -> float:
    """Bytes a token that live only while a layer runs backward: fitted to dry runs on fake tensors of each kind of training."""
    h, i = shape.hidden, shape.intermediate
    residual, compute = _bytes(setup)
    scale = compute / 2
    if setup.engine is Engine.DEEPSPEED:
        return 2 * h + 6 * i
    if setup.method == "full":
        return scale * (4 * i + (3.3 * h if residual == 4 else 2 * h))
    if setup.method == "qlora":
        return 8 * i + 8.5 * h if setup.dropout > 0 else 10 * i + 2.5 * h
    return scale * ((8 if setup.dropout > 0 else 6) * i + 6 * h)


@dataclass(frozen=True, slots=True)
class Static:
    """What lies on the device all the time."""

    weights: float
    adapters: float
    optimizer: float
    gradients: float
    """Kept between micro-steps; 0 without accumulation, and where DeepSpeed offloads them."""

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.optimizer + self.gradients


def static(setup: Setup, counts: Counts) -> Static:
    rest = counts.base - counts.linear
    residual, _ = _bytes(setup)
    each = residual if setup.is_adapted else _full_bytes(setup)
    linear = counts.linear * (packed_bytes(setup) if setup.method == "qlora" else each)
    weights = linear + rest * each
    adapters = counts.trained * each if setup.is_adapted else 0
    if setup.engine is not Engine.DEEPSPEED:
        trained = _full_bytes(setup) if setup.method == "full" else 4
        return Static(weights, adapters, 2 * trained * counts.trained, _kept(setup, trained * counts.trained))
    ranks = setup.world_size
    if setup.stage == 3:
        is_gathered = setup.method != "qlora" and (ranks > 1 or setup.offloads_parameters)
        # The limit holds back what is fetched ahead; embedding and head come on top of it when they are needed.
        gathered = 2 * min(setup.live_elements + 2 * counts.head, counts.base) if is_gathered else 0
        weights = (0 if setup.offloads_parameters else weights / ranks) + gathered
    optimizer = 0 if setup.is_offloaded else 12 * counts.trained / ranks
    gradients = 0 if setup.is_offloaded else 2 * counts.trained / (ranks if setup.stage >= 2 else 1)
    return Static(weights, adapters, optimizer, _kept(setup, gradients))


def _kept(setup: Setup, gradient_bytes: float) -> float:
    return gradient_bytes if setup.accumulation > 1 else 0.0


def _full_bytes(setup: Setup) -> int:
    if setup.engine is Engine.DEEPSPEED:
        return 2
    return 4 if setup.weights == "float32" else 2


def packed_bytes(setup: Setup) -> float:
    """Of a weight in 4 or 8 bits with its constants."""
    if setup.bits == 8:
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if setup.is_double_quantized else 4 / 64)


def logits_bytes(shape: Shape, setup: Setup) -> float:
    """A token's logits at the end of the forward pass: float32, their log-softmax, and a shifted or a 16-bit copy."""
    if shape.head_name == "output":
        return shape.vocabulary * (8.0 if setup.batch_size == 1 else 12.0)
    return shape.vocabulary * 10.0


def buckets(setup: Setup, counts: Counts) -> float:
    """What ranks reduce gradients through: DeepSpeed's two buckets, or the copies of DistributedDataParallel."""
    if setup.engine is Engine.DEEPSPEED:
        return 2.0 * setup.bucket_elements * (2 if setup.stage < 3 and setup.overlaps else 1)
    if setup.world_size == 1:
        return 0.0
    return float(counts.trained * (_full_bytes(setup) if setup.method == "full" else 4))


def workspace() -> float:
    return float(_WORKSPACE)
