"""Is what the quantiser wrote the model it was given? Names, shapes and values of every tensor, from the files, a block of rows at a time.

AWQ makes some channels larger before rounding and takes that back in the layer before. Here the factor of a channel is read off that layer
(the norm, or the rows of the matrix) and divided out, so that what is left is the rounding. Format: compressed-tensors, "pack-quantized".
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.blocks import read_rows
from core.checkpoints.shards import read_folder
from core.checkpoints.tensors import DiskTensor, is_finite, widen
from core.errors import JobError
from core.files import read_json
from core.messages import message
from core.quantize.plan import fitting_group, matrices
from core.runs.job import Progress

TOLERANCE: Final = 0.9
"""Relative L2 error of a matrix. Rounding to the nearest of 4 bits costs 0.1; GPTQ, which minds outputs and not weights, and AWQ's
unimportant channels cost more: at worst 0.18 and 0.36 in two layers of SmolLM2-135M. Wrong weights, scales or order give 1 and above, so
this tells a broken file, not a poor one: for that there is the loss."""
_BLOCK_ELEMENTS: Final = 1 << 21
_SHIFTS: Final = np.arange(0, 32, 4, dtype=np.uint32)
_ZERO: Final = 8
"""Stored are the numbers 0 to 15 for -8 to 7."""
_BEFORE: Final = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
"""Module → what its input comes out of, in the layers of ARCHITECTURES."""
Floats = NDArray[np.float32]
Factors = dict[str, Floats]
"""By how much AWQ made a module's outputs smaller, channel by channel."""


def check_quantized(source: Path, made: Path, *, is_scaled: bool, progress: Progress) -> dict[str, Any]:
    """Compare the folder `made` with `source`. Memory: a few blocks. `is_scaled`: it was made by AWQ.

    Returns {"matrices", "kept", "weight_error", "worst_error", "worst_name"}: errors relative, the first over all matrices.
    Raises JobError `quantize.wrong_tensors`, `quantize.wrong_weights`.
    """
    shards = read_folder(source)
    before = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    after = {name: tensor for shard in read_folder(made) for name, tensor in shard.tensors.items()}
    chosen = matrices(shards)
    group = fitting_group(chosen)
    kept = [name for name in before if name not in chosen]
    wrong = _wrong(before, after, chosen, group, made)
    wrong = wrong or [
        name for name in kept if not (is_scaled and _is_scalable(name)) and not _is_same(name, before, after)
    ]
    if wrong:
        raise JobError("quantize.wrong_tensors", path=str(made), count=len(wrong), name=wrong[0])
    smaller: Factors | None = _norm_factors(before, after) if is_scaled else None
    errors: dict[str, tuple[float, float]] = {}
    order = sorted(chosen, key=lambda name: name.endswith(("o_proj.weight", "down_proj.weight")))
    for name in order:
        errors[name] = _error(name, chosen[name], after, group, smaller)
        progress.update(len(errors), len(order), message("quantize.progress.verifying"), unit="tensors")
    relative = {name: (lost / whole) ** 0.5 if whole else 0.0 for name, (lost, whole) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    if not relative[worst] <= TOLERANCE:
        raise JobError("quantize.wrong_weights", name=worst, error=relative[worst], tolerance=TOLERANCE)
    lost, whole = (sum(pair[at] for pair in errors.values()) for at in (0, 1))
    return {
        "matrices": len(chosen),
        "kept": len(kept),
        "weight_error": (lost / whole) ** 0.5 if whole else 0.0,
        "worst_error": relative[worst],
        "worst_name": worst.removesuffix(".weight"),
    }


def unpack(packed: NDArray[Any], scales: Floats, group: int) -> Floats:
    """The weights that `packed` (int32, eight numbers each, the first in the lowest bits) and `scales` (one a group of a row) stand for."""
    rows = len(packed)
    numbers = ((packed.view(np.uint32)[:, :, None] >> _SHIFTS) & 15).reshape(rows, -1).astype(np.float32) - _ZERO
    return (numbers.reshape(rows, -1, group) * scales[:, :, None]).reshape(rows, -1)


def _wrong(
    before: Mapping[str, DiskTensor],
    after: Mapping[str, DiskTensor],
    chosen: Mapping[str, DiskTensor],
    group: int,
    made: Path,
) -> list[str]:
    """Names of tensors that lack, are too many, have another shape, or are not numbers."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in before.items():
        if name not in chosen:
            expected[name] = (tensor.dtype, tensor.shape)
            continue
        rows, width = tensor.shape
        expected[f"{name}_packed"] = ("I32", (rows, width // 8))
        expected[f"{name}_scale"] = (tensor.dtype, (rows, width // group))
        expected[f"{name}_shape"] = ("I64", (2,))
    # A head that is tied to the embedding may be stored or not.
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()}
    optional = {"lm_head.weight"} if _is_tied(made) else set()
    names = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)} - optional
    broken = {name for name in found if name.endswith(("_scale", "norm.weight")) and not _is_whole(after[name])}
    return sorted(names | broken)


def _is_scalable(name: str) -> bool:
    """Whether AWQ may change it: what scales a channel before a matrix that is rounded."""
    return name.endswith(("layernorm.weight", "v_proj.bias", "up_proj.bias"))


def _is_same(name: str, before: Mapping[str, DiskTensor], after: Mapping[str, DiskTensor]) -> bool:
    """Bit for bit; a tied head that is not stored is the embedding's business."""
    if name not in after:
        return True
    pairs = zip(*(read_rows(side[name], side[name].numel, 1, _BLOCK_ELEMENTS) for side in (before, after)), strict=True)
    return all(np.array_equal(one.view(np.uint8), other.view(np.uint8)) for (_, one), (_, other) in pairs)


def _is_tied(made: Path) -> bool:
    return bool(read_json(made / "config.json").get("tie_word_embeddings"))


def _is_whole(tensor: DiskTensor) -> bool:
    return is_finite(tensor.read(), tensor.dtype)


def _norm_factors(before: Mapping[str, DiskTensor], after: Mapping[str, DiskTensor]) -> Factors:
    """Of the norms before attention and MLP."""
    found: Factors = {}
    for name, tensor in before.items():
        if name.endswith("layernorm.weight"):
            was, now = _floats(tensor), _floats(after[name])
            # A channel that the norm switches off has no factor, and no need of one.
            found[name.removesuffix(".weight")] = np.divide(now, was, out=np.ones_like(was), where=was != 0)
    return found


def _error(
    name: str, source: DiskTensor, after: Mapping[str, DiskTensor], group: int, smaller: "Factors | None"
) -> tuple[float, float]:
    """(squares of what differs, squares of the weights) of one matrix."""
    module = name.removesuffix(".weight")
    width = source.shape[1]
    columns = _input_factors(module, width, smaller)
    rows_out: list[Floats] = []
    lost = whole = 0.0
    for original, packed, factors in _blocks(source, after[f"{name}_packed"], after[f"{name}_scale"]):
        found = unpack(packed, factors, group) * columns
        if smaller is not None and module.endswith(("v_proj", "up_proj")):
            # By least squares: how much smaller each row was made.
            own = np.einsum("ij,ij->i", found, original) / np.maximum(np.einsum("ij,ij->i", original, original), 1e-30)
            rows_out.append(own.astype(np.float32))
            found /= np.where(own == 0, 1, own)[:, None]
        lost += float(np.square(found - original).sum(dtype=np.float64))
        whole += float(np.square(original).sum(dtype=np.float64))
    if smaller is not None and rows_out:
        smaller[module] = np.concatenate(rows_out)
    return lost, whole


def _input_factors(module: str, width: int, smaller: "Factors | None") -> "Floats | np.float32":
    """What each column has to be multiplied with to be as it was; ones where nothing was changed before this module."""
    if smaller is None:
        return np.float32(1)
    prefix, kind = module.rsplit(".", 2)[0], ".".join(module.rsplit(".", 2)[1:])
    factors = smaller.get(f"{prefix}.{_BEFORE.get(kind, '')}")
    # Grouped heads share the values of v_proj: there AWQ leaves v_proj and o_proj as they are.
    return np.float32(1) if factors is None or len(factors) != width else factors


def _blocks(source: DiskTensor, packed: DiskTensor, scale: DiskTensor) -> Iterator[tuple[Floats, NDArray[Any], Floats]]:
    rows, width = source.shape
    step = max(1, _BLOCK_ELEMENTS // width)
    parts = (read_rows(tensor, rows, tensor.shape[1], step) for tensor in (source, packed, scale))
    for (_, original), (_, numbers), (_, factors) in zip(*parts, strict=True):
        yield (
            widen(original, source.dtype).reshape(-1, width),
            numbers.reshape(-1, packed.shape[1]),
            widen(factors, scale.dtype).reshape(-1, scale.shape[1]),
        )


def _floats(tensor: DiskTensor) -> Floats:
    return widen(tensor.read(), tensor.dtype)
