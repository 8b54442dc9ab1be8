"""The weights in a training checkpoint, whatever its form: plain file or DeepSpeed folder of any stage and world size.

Opens headers only. A parameter that ZeRO has cut into pieces is put together when it is read, from the bytes of these pieces.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.checkpoints.reader import Inert, read_torch_file
from core.checkpoints.shards import Readable
from core.checkpoints.tensors import NUMPY_TYPES, Array, DiskTensor, convert
from core.errors import InputError

_RANK: Final = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt$")


@dataclass(frozen=True, slots=True)
class PiecedTensor:
    """A tensor whose flattened elements lie in several places, in order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[DiskTensor, int, int], ...]
    """Flat tensor, first element, end."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize

    def read(self) -> Array:
        flat = [tensor.read_flat(start, stop) for tensor, start, stop in self.pieces]
        whole = np.concatenate(flat) if len(flat) != 1 else flat[0]
        return whole[: math.prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True, slots=True)
class CastTensor:
    """A tensor read in another type than the one it lies in."""

    source: Readable
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize

    def read(self) -> Array:
        return convert(self.source.read(), self.source.dtype, self.dtype)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint."""

    path: Path
    weights: dict[str, Readable]
    """As trained: what the model computed with (bf16 under DeepSpeed's bf16), names as XTuner wrote them (`llm.…`)."""
    masters: dict[str, Readable] = field(default_factory=dict)
    """float32 copies that the optimizer keeps under ZeRO; empty for a plain file."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """mmengine's: iter, epoch, seed, cfg (the config as text)."""
    stage: int = 0
    world_size: int = 1
    has_optimizer: bool = False
    missing_ranks: tuple[int, ...] = ()
    """Ranks whose optimizer part is not there: the weights are whole (stages 1 and 2), training cannot go on."""

    @property
    def iteration(self) -> int | None:
        value = self.meta.get("iter")
        return int(value) if isinstance(value, int) else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises InputError: `checkpoints.missing`, `checkpoints.no_weights`, `checkpoints.cut`, `checkpoints.mixed_files`, and those of
    read_torch_file."""
    if path.is_dir():
        try:
            return _open_folder(path)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # files of different trainings, or of other tools
            raise InputError(
                "checkpoints.mixed_files", path=str(path), reason=f"{type(error).__name__}: {error}"
            ) from error
    content = read_torch_file(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, DiskTensor) for value in state.values()):
        raise InputError("checkpoints.no_weights", path=str(path))
    weights: dict[str, Readable] = {name: value for name, value in state.items() if isinstance(value, DiskTensor)}
    meta = content.get("meta")
    return Checkpoint(path, weights, meta=meta if isinstance(meta, dict) else {}, has_optimizer="optimizer" in content)


def rank_files(folder: Path, which: str) -> dict[int, Path]:
    """Data-parallel rank → its `model` or `optim` states file. Raises InputError `checkpoints.tensor_parallel`."""
    found: dict[int, Path] = {}
    for file in sorted(folder.glob(f"*_{which}_states.pt")):
        if match := _RANK.search(file.name):
            if match[2] != "00":
                raise InputError("checkpoints.tensor_parallel", path=str(folder))
            found[int(match[1])] = file
    return found


def _open_folder(folder: Path) -> Checkpoint:
    optimizers = rank_files(folder, "optim")
    models = rank_files(folder, "model")
    plain = folder / "mp_rank_00_model_states.pt"
    first = models.get(0, plain)
    if not first.exists():
        raise InputError("checkpoints.not_deepspeed", path=str(folder))
    state = read_torch_file(first)
    world_size = int(state.get("dp_world_size", len(optimizers) or 1))
    stage = 3 if models else _stage(state)
    expected = range(world_size)
    missing = [rank for rank in expected if rank not in optimizers or (stage == 3 and rank not in models)]
    module = state.get("module") or {}
    whole = {name: value for name, value in module.items() if isinstance(value, DiskTensor)} if stage < 3 else {}
    if missing and stage == 3:
        raise InputError(
            "checkpoints.cut", path=str(folder), missing=", ".join(map(str, missing)), world_size=world_size
        )
    masters: dict[str, Readable] = {}
    if stage > 0 and not missing:
        zero = [read_torch_file(optimizers[rank])["optimizer_state_dict"] for rank in expected]
        masters = dict(
            _masters3(zero, state["param_shapes"]) if stage == 3 else _masters12(zero, state["param_shapes"])
        )
    frozen = _frozen(state, [state] + [read_torch_file(models[rank]) for rank in expected[1:]]) if stage == 3 else {}
    trained = _trained_dtype(state)
    weights: dict[str, Readable] = dict(whole)
    if stage == 3:
        weights = {
            name: CastTensor(tensor, trained) if trained != tensor.dtype else tensor for name, tensor in masters.items()
        }
        weights |= frozen
        weights |= {
            name: value
            for name, value in module.items()
            if isinstance(value, DiskTensor) and value.numel and name not in weights
        }
    for name, source in (state.get("shared_params") or {}).items():
        if source in weights:
            weights.setdefault(name, weights[source])
    if not weights:
        raise InputError("checkpoints.no_weights", path=str(folder))
    return Checkpoint(
        folder, weights, masters, state.get("meta") or {}, stage, world_size, bool(optimizers), tuple(missing)
    )


def _stage(state: Mapping[str, Any]) -> int:
    zero = (state.get("ds_config") or {}).get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    return int(stage.arguments[0]) if isinstance(stage, Inert) else int(stage)


def _trained_dtype(state: Mapping[str, Any]) -> str:
    config = state.get("ds_config") or {}
    for key, dtype in (("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "F16")):
        if (config.get(key) or {}).get("enabled") is True:
            return dtype
    return "F32"


def _masters12(zero: list[Any], shapes: list[Mapping[str, Any]]) -> dict[str, Readable]:
    """Stages 1 and 2: each group is one flat vector, cut over the ranks one after another; only its end is padded."""
    found: dict[str, Readable] = {}
    for number, group in enumerate(shapes):
        parts = [rank["single_partition_of_fp32_groups"][number] for rank in zero]
        starts = np.cumsum([0] + [part.numel for part in parts]).tolist()
        offset = 0
        for name, shape in group.items():
            end = offset + math.prod(shape)
            if end > starts[-1]:
                raise ValueError(f"{name} ends at {end} of {starts[-1]}")
            pieces = tuple(
                (part, max(offset, start) - start, min(end, start + part.numel) - start)
                for part, start in zip(parts, starts, strict=False)
                if max(offset, start) < min(end, start + part.numel)
            )
            found[name] = PiecedTensor("F32", tuple(shape), pieces)
            offset = end
    return found


def _masters3(zero: list[Any], shapes: list[Mapping[str, Any]]) -> dict[str, Readable]:
    """Stage 3: each parameter is cut evenly over the ranks; a sub-group holds its parameters' parts one after another."""
    found: dict[str, Readable] = {}
    sub_groups = zero[0]["fp32_flat_groups"]
    rows = [(name, tuple(shape)) for group in shapes for name, shape in group.items()]
    number, offset = 0, 0
    for name, shape in rows:
        part = math.ceil(math.prod(shape) / len(zero))
        if offset >= sub_groups[number].numel:
            number, offset = number + 1, 0
        pieces = tuple((rank["fp32_flat_groups"][number], offset, offset + part) for rank in zero)
        if any(offset + part > flat.numel for flat, _, _ in pieces):
            raise ValueError(f"{name} ends at {offset + part} of {sub_groups[number].numel}")
        found[name] = PiecedTensor("F32", shape, pieces)
        offset += part
    return found


def _frozen(state: Mapping[str, Any], states: list[Any]) -> dict[str, Readable]:
    """Frozen parameters under stage 3, if they were saved: cut evenly over the ranks."""
    found: dict[str, Readable] = {}
    for name, shape in (state.get("frozen_param_shapes") or {}).items():
        parts = [rank["frozen_param_fragments"][name] for rank in states if rank.get("frozen_param_fragments")]
        if parts:
            found[name] = PiecedTensor(parts[0].dtype, tuple(shape), tuple((part, 0, part.numel) for part in parts))
    return found
