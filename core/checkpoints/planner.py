"""Before a delivery starts: what it will need (memory, disk, time) and whether the adapter belongs to this base. Writes nothing."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.checkpoints.adapter import adapter_config, choose_weights, local_folder, peft_name
from core.checkpoints.gpu_blocks import CPU
from core.checkpoints.inspect import CheckpointCard
from core.checkpoints.lora import Adapter, plan_changes
from core.checkpoints.recipe import Recipe, read_recipe
from core.checkpoints.shards import Readable, Shard, read_folder
from core.checkpoints.staging import left_bytes
from core.checkpoints.tensors import NUMPY_TYPES, DiskTensor
from core.checkpoints.weights import open_checkpoint
from core.errors import ConflictError, DanluError, InputError, MachineError
from core.files import read_json

_PROCESS_BYTES: Final = 200 * 2**20
"""A Python process with numpy, and the blocks and windows of its threads."""
_GPU_PROCESS_BYTES: Final = 3 * 2**30
"""The same with torch and a GPU's driver in it. Careful."""
_SLACK_BYTES: Final = 2**24
_BYTES_A_SECOND: Final = 250 * 2**20
"""Careful: reading, computing and writing a merged model on a plain disk with sync."""


@dataclass(frozen=True, slots=True)
class DeliveryPlan:
    """What a person sees before the start."""

    recipe: Recipe
    base: Path | None
    """The base model's folder, if it is on this machine."""
    adapter_bytes: int
    merged_bytes: int
    ram_bytes: int
    disk_bytes: int
    free_bytes: int
    seconds: float
    problem: DanluError | None = None
    """Why it cannot start as asked."""

    @property
    def can_start(self) -> bool:
        return self.problem is None


def plan_delivery(
    card: CheckpointCard,
    targets: list[Path],
    *,
    base_model: str | None,
    dtype: str,
    merge: bool,
    verify: bool,
    device: str = CPU,
) -> DeliveryPlan:
    """Figures for delivering `card` into `targets` (adapter or full model, and the merged model).

    Never raises for bad input: see `problem`.

    `dtype`: of the adapter or full model, see export_adapter. `device`: that the merge computes on.
    """
    try:
        opened = open_checkpoint(card.path)
    except DanluError as error:
        return DeliveryPlan(Recipe(), None, 0, 0, 0, 0, 0, 0.0, error)
    recipe = read_recipe(card.path, opened.meta)
    base = local_folder(base_model or recipe.base_model)
    item = NUMPY_TYPES[dtype].itemsize if dtype in NUMPY_TYPES else 0
    merge = merge and bool(card.is_adapter)
    weights = {}
    problem: DanluError | None = None
    try:
        weights = choose_weights(opened, dtype)
        named = {peft_name(name): tensor for name, tensor in weights.items()} if card.is_adapter else {}
        config = adapter_config(recipe, named, card.path, base_model) if card.is_adapter else {}
        if base is None and (merge or not card.is_adapter):
            raise InputError("checkpoints.no_base", path=str(base_model or recipe.base_model))
        if base is not None and merge:
            _check_fit(check_base(base, recipe), base, card.path, config, named)
    except DanluError as error:
        problem = error
    own = sum(
        tensor.nbytes // NUMPY_TYPES[tensor.dtype].itemsize * (item or NUMPY_TYPES[tensor.dtype].itemsize)
        for tensor in weights.values()
    )
    merged = _weight_bytes(base) if merge and base is not None and problem is None else 0
    needs = dict(zip(reversed(targets), [merged, own] if merge else [own], strict=False))
    problem = problem or _space_problem(needs)
    passes = 2.0 if verify else 1.0
    largest = max((tensor.nbytes for tensor in weights.values()), default=0)
    return DeliveryPlan(
        recipe,
        base,
        own,
        merged,
        (_PROCESS_BYTES if device == CPU or not merge else _GPU_PROCESS_BYTES) + 2 * largest,
        sum(needs.values()) + _SLACK_BYTES,
        _free_bytes(targets[-1]),
        2 + passes * (own + merged) / _BYTES_A_SECOND,
        problem,
    )


def check_base(base: Path, recipe: Recipe) -> list[Shard]:
    """The base's weight files. Raises InputError if `base` is quantised (`checkpoints.quantized_base`), damaged, or not the one trained on
    (`checkpoints.other_base`),
    `checkpoints.no_base`."""
    if local_folder(str(base)) is None:
        raise InputError("checkpoints.no_base", path=str(base))
    if read_json(base / "config.json").get("quantization_config"):
        raise InputError("checkpoints.quantized_base", path=str(base))
    shards = read_folder(base)
    if recipe.base_fingerprint:
        from core.models.inspect import fingerprint

        if fingerprint(base) != recipe.base_fingerprint:
            raise InputError("checkpoints.other_base", path=str(base), trained=str(recipe.base_model))
    return shards


def _check_fit(
    shards: list[Shard], base: Path, checkpoint: Path, config: dict[str, Any], weights: Mapping[str, Readable]
) -> None:
    """Whether every tensor of the adapter has a place of its shape. Raises what `lora.plan_changes` raises."""
    is_tied = bool(read_json(base / "config.json").get("tie_word_embeddings"))
    shapes = {name: DiskTensor(checkpoint, tensor.dtype, tensor.shape, 0) for name, tensor in weights.items()}
    held = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    plan_changes([Adapter(checkpoint, config, shapes)], held, is_tied=is_tied)


def _weight_bytes(base: Path) -> int:
    return sum(shard.size_bytes for shard in read_folder(base))


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _space_problem(needs: Mapping[Path, int]) -> DanluError | None:
    """`needs`: bytes by target. Targets may lie on several disks."""
    disks: dict[int, int] = {}
    for target, size_bytes in needs.items():
        if target.exists():
            return ConflictError("files.exists", path=str(target))
        place = _existing(target)
        if not os.access(place, os.W_OK):
            return MachineError("checkpoints.read_only", path=str(target.parent))
        disk = place.stat().st_dev
        disks[disk] = disks.get(disk, _SLACK_BYTES) + size_bytes - left_bytes(target)
        free = _free_bytes(target)
        if disks[disk] > free:
            return MachineError(
                "files.no_space",
                path=str(target.parent),
                needed_gib=round(disks[disk] / 2**30, 2),
                free_gib=round(free / 2**30, 2),
            )
    return None
