"""Before a delivery starts: what it will need (memory, disk, time) and whether the adapter belongs to this base. Writes nothing."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.checkpoints.adapter import adapter_config, choose_weights, local_folder, peft_name
from core.checkpoints.inspect import CheckpointCard
from core.checkpoints.recipe import Recipe, read_recipe
from core.checkpoints.shards import read_folder
from core.checkpoints.tensors import NUMPY_TYPES
from core.checkpoints.weights import open_checkpoint
from core.errors import ConflictError, DanluError, InputError, MachineError
from core.files import read_json

_PROCESS_BYTES: Final = 200 * 2**20
"""A Python process with numpy, and the blocks and windows of its threads."""
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
    card: CheckpointCard, targets: list[Path], *, base_model: str | None, dtype: str, merge: bool, verify: bool
) -> DeliveryPlan:
    """Figures for delivering `card` into `targets` (adapter or full model, and the merged model).

    Never raises for bad input: see `problem`.

    `dtype`: of the adapter or full model, see export_adapter.
    """
    try:
        opened = open_checkpoint(card.path)
    except DanluError as error:
        return DeliveryPlan(Recipe(), None, 0, 0, 0, 0, 0, 0.0, error)
    recipe = read_recipe(card.path, opened.meta)
    base = local_folder(base_model or recipe.base_model)
    item = NUMPY_TYPES[dtype].itemsize if dtype in NUMPY_TYPES else 0
    weights = {}
    problem: DanluError | None = None
    try:
        weights = choose_weights(opened, dtype)
        if card.is_adapter:
            adapter_config(recipe, {peft_name(name): tensor for name, tensor in weights.items()}, card.path, base_model)
        if base is None and (merge or not card.is_adapter):
            raise InputError("checkpoints.no_base", path=str(base_model or recipe.base_model))
        if base is not None and merge:
            check_base(base, recipe)
    except DanluError as error:
        problem = error
    own = sum(
        tensor.nbytes // NUMPY_TYPES[tensor.dtype].itemsize * (item or NUMPY_TYPES[tensor.dtype].itemsize)
        for tensor in weights.values()
    )
    merged = _weight_bytes(base) if merge and base is not None and problem is None else 0
    disk = own + merged + 2**24
    free = _free_bytes(targets[0])
    problem = problem or _space_problem(targets, disk, free)
    passes = 2.0 if verify else 1.0
    largest = max((tensor.nbytes for tensor in weights.values()), default=0)
    return DeliveryPlan(
        recipe,
        base,
        own,
        merged,
        _PROCESS_BYTES + 2 * largest,
        disk,
        free,
        2 + passes * (own + merged) / _BYTES_A_SECOND,
        problem,
    )


def check_base(base: Path, recipe: Recipe) -> None:
    """Raises InputError if `base` is quantised (`checkpoints.quantized_base`), damaged, or not the one trained on
    (`checkpoints.other_base`),
    `checkpoints.no_base`."""
    if local_folder(str(base)) is None:
        raise InputError("checkpoints.no_base", path=str(base))
    if read_json(base / "config.json").get("quantization_config"):
        raise InputError("checkpoints.quantized_base", path=str(base))
    read_folder(base)
    if recipe.base_fingerprint:
        from core.models.inspect import fingerprint

        if fingerprint(base) != recipe.base_fingerprint:
            raise InputError("checkpoints.other_base", path=str(base), trained=str(recipe.base_model))


def _weight_bytes(base: Path) -> int:
    return sum(shard.size_bytes for shard in read_folder(base))


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def _space_problem(targets: list[Path], disk: int, free: int) -> DanluError | None:
    for target in targets:
        if target.exists():
            return ConflictError("files.exists", path=str(target))
    if disk > free:
        return MachineError(
            "files.no_space",
            path=str(targets[0].parent),
            needed_gib=round(disk / 2**30, 2),
            free_gib=round(free / 2**30, 2),
        )
    return None
