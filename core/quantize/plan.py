"""Whether a model can be written with 4-bit weights, and what that will need. Reads headers only, writes nothing.

Weights of linear layers become integers of 4 bits, symmetric, with one scale a group of neighbours in a row ("W4A16"); embedding, head,
norms and biases stay as they are.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from core.checkpoints.gguf_layout import read_config
from core.checkpoints.lora import EMBEDDINGS, HEADS
from core.checkpoints.shards import Shard, read_folder
from core.checkpoints.tensors import DTYPE_NAMES, FLOATS, DiskTensor
from core.errors import DanluError, InputError, MachineError
from core.files import require_absent

METHODS: Final = ("awq", "gptq")
ARCHITECTURES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that llm-compressor 0.14 has mappings for and whose tensors `check` knows. InternLM2 is not in transformers, and its own
code (modeling_internlm2.py) does not start on the transformers 5 that llm-compressor needs."""
GROUPS: Final = (128, 64, 32)
"""Sizes of a group that vLLM has kernels for; the largest that fits is taken."""
_BITS: Final = 4
_PROCESS_BYTES: Final = 2 * 2**30
"""torch, transformers and llm-compressor loaded, and one layer's statistics."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """What a person sees before the start."""

    group_size: int
    dtype: str
    """What the model computes in: "bfloat16", "float16" or "float32"."""
    matrices: int
    """Weights that become 4-bit."""
    target_bytes: int
    ram_bytes: int
    free_bytes: int
    problem: DanluError | None = None

    @property
    def can_start(self) -> bool:
        return self.problem is None


def plan_quantization(model: Path, target: Path) -> QuantizationPlan:
    """Figures for writing `model` to `target`. Never raises for bad input: see `problem`."""
    try:
        return require_plan(model, target)
    except DanluError as error:
        return QuantizationPlan(0, "", 0, 0, 0, 0, error)


def require_plan(model: Path, target: Path) -> QuantizationPlan:
    """As plan_quantization; raises the problem.

    InputError `quantize.architecture`, `quantize.remote_code`, `quantize.group`, `quantize.mixed_types`, MachineError `quantize.memory`,
    `files.no_space`, ConflictError `files.exists`, and those of read_folder.
    """
    require_absent(target)
    config = read_config(model)
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        code = "quantize.remote_code" if "auto_map" in config else "quantize.architecture"
        raise InputError(code, architecture=kind, known=", ".join(ARCHITECTURES))
    shards = read_folder(model)
    chosen = matrices(shards)
    group = fitting_group(chosen)
    small = sum(tensor.nbytes for tensor in chosen.values())
    whole = sum(shard.size_bytes for shard in shards)
    packed = sum(tensor.numel * _BITS // 8 + tensor.numel // group * 2 for tensor in chosen.values())
    free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free
    plan = QuantizationPlan(
        group, _only_dtype(shards), len(chosen), whole - small + packed, 2 * whole + _PROCESS_BYTES, free
    )
    if plan.target_bytes + 2**24 > free:
        raise MachineError(
            "files.no_space", path=str(target.parent), needed_gib=_gib(plan.target_bytes + 2**24), free_gib=_gib(free)
        )
    available = psutil.virtual_memory().available
    if whole + _PROCESS_BYTES > available:
        raise MachineError("quantize.memory", needed_gib=_gib(whole + _PROCESS_BYTES), free_gib=_gib(available))
    return plan


def matrices(shards: Iterable[Shard]) -> dict[str, DiskTensor]:
    """Weights of linear layers other than embedding and head, by name."""
    return {
        name: tensor
        for shard in shards
        for name, tensor in shard.tensors.items()
        if len(tensor.shape) == 2
        and tensor.dtype in FLOATS
        and name.endswith(".weight")
        and name.removesuffix(".weight").rpartition(".")[2] not in (*EMBEDDINGS, *HEADS)
    }


def fitting_group(chosen: "dict[str, DiskTensor]") -> int:
    """The largest of GROUPS that divides every width. Raises InputError `quantize.group`."""
    for group in GROUPS:
        if all(tensor.shape[1] % group == 0 for tensor in chosen.values()):
            return group
    name, tensor = next((n, t) for n, t in chosen.items() if t.shape[1] % GROUPS[-1])
    raise InputError("quantize.group", name=name, width=tensor.shape[1], smallest=GROUPS[-1])


def _only_dtype(shards: Iterable[Shard]) -> str:
    """The type of all weights: the quantiser loads a model in one. Raises InputError `quantize.mixed_types`."""
    found = sorted(
        {DTYPE_NAMES[tensor.dtype] for shard in shards for tensor in shard.tensors.values() if tensor.dtype in FLOATS}
    )
    if len(found) != 1:
        raise InputError("quantize.mixed_types", types=", ".join(found))
    return found[0]


def _gib(size: int) -> float:
    return round(size / 2**30, 2)
