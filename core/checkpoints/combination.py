"""Several adapters of one base → one model. Their updates are summed by the merge itself; the other methods (TIES, DARE, pruning by
magnitude) make one adapter first, tensor by tensor, with peft's own functions, and this one is merged.

TIES: arXiv 2306.01708; DARE: arXiv 2311.03099. As in peft's add_weighted_adapter they work on A and B apart, each with the square root
of the adapter's weight times its scale, so all ranks must be equal.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.checkpoints.adapter import CONFIG, WEIGHTS
from core.checkpoints.companions import copy_tokenizer, describe, write_chat_template
from core.checkpoints.deliverables import ONE_THREAD, gpus_for
from core.checkpoints.gpu_blocks import CPU
from core.checkpoints.lora import Adapter, open_adapter, scale_of, split_key
from core.checkpoints.merge import merge_adapter, read_description
from core.checkpoints.planner import check_base
from core.checkpoints.recipe import Recipe
from core.checkpoints.shards import write_shard
from core.checkpoints.staging import stage
from core.checkpoints.tensors import Array, widen
from core.checkpoints.verify import verify_merge
from core.errors import ConflictError, InputError
from core.files import require_absent, require_space, within, write_json
from core.messages import message
from core.models.remote_code import require_allowed
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.job import Progress
from core.runs.launch import start_job

SUM: Final = "sum"
METHODS: Final = (SUM, "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""`sum` is exact; the others are named as peft names them, and keep a share (the density) of each adapter's values."""
_PARTS: Final = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_NAME_CHARACTERS: Final = frozenset("-_.")


def start_combination(
    project: Project,
    adapters: Sequence[Path],
    weights: Sequence[float],
    name: str,
    *,
    method: str,
    density: float,
    verify: bool,
    device: str = CPU,
) -> RunDirectory:
    """Start `deliver_combination` as a job of kind "merge". `device`: that the merge computes on.

    Raises InputError `checkpoints.bad_method`, `checkpoints.bad_name`, `checkpoints.too_few_adapters`, `files.outside`; ConflictError
    `files.exists`; MachineError `checkpoints.no_gpu`.
    """
    if method not in METHODS or not 0 < density < 1:
        raise InputError("checkpoints.bad_method", method=method, density=density)
    if len(adapters) < 2 or len(adapters) != len(weights):
        raise InputError("checkpoints.too_few_adapters")
    stripped = name.strip()
    if (
        not stripped
        or stripped[0] in _NAME_CHARACTERS
        or any(not (c.isalnum() or c in _NAME_CHARACTERS) for c in stripped)
    ):
        raise InputError("checkpoints.bad_name", name=stripped)
    for target in combination_targets(project, stripped, method):
        if target.exists():
            raise ConflictError("files.exists", path=str(target))
    arguments = {
        "project": str(project.root),
        "adapters": [str(within(folder, project.huggingface)) for folder in adapters],
        "weights": [float(weight) for weight in weights],
        "name": stripped,
        "method": method,
        "density": density,
        "verify": verify,
        "device": device,
    }
    function = "core.checkpoints.combination:deliver_combination"
    gpus = gpus_for(device)
    return start_job(project, function, kind="merge", title=stripped, arguments=arguments, gpus=gpus, env=ONE_THREAD)


def combination_targets(project: Project, name: str, method: str) -> list[Path]:
    """Folders that a combination makes: the model, and but for the sum the adapter that it is merged from."""
    return ([] if method == SUM else [project.huggingface / name]) + [project.final_model / name]


def deliver_combination(
    project: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    *,
    method: str = SUM,
    density: float = 0.5,
    verify: bool = True,
    device: str = CPU,
    progress: Progress,
) -> dict[str, Any]:
    """Adapters → merged model in final_model/`name` → verified. A job function. Returns {"adapter", "model", "verified"}.

    Raises InputError `checkpoints.other_base` for adapters of different bases, and those of combine_adapters and merge_adapter.
    """
    place = Project(Path(project))
    opened = [open_adapter(Path(folder)) for folder in adapters]
    base = Path(str(opened[0].config.get("base_model_name_or_path")))
    for adapter in opened:
        recorded = read_description(adapter.folder).get("base_model") or {}
        check_base(base, Recipe(base_model=recorded.get("path"), base_fingerprint=recorded.get("fingerprint")))
    if verify:
        require_allowed(place, base)
    made: Path | None = None
    if method != SUM:
        made = place.huggingface / name
        combine_adapters(adapters, weights, str(made), method=method, density=density, progress=progress)
        adapters, weights = [str(made)], [1.0]
    model = place.final_model / name
    merge_adapter(str(base), adapters, str(model), weights=weights, device=device, progress=progress)
    verified = verify_merge(str(model), progress=progress) if verify else None
    return {"adapter": str(made) if made else None, "model": str(model), "verified": verified}


def combine_adapters(
    adapters: Sequence[str],
    weights: Sequence[float],
    target: str,
    *,
    method: str,
    density: float,
    seed: int = 0,
    progress: Progress,
) -> dict[str, Any]:
    """Write the PEFT folder `target`, in float32. `density`: share of the values that are kept; `seed`: of what DARE drops.

    Returns {"path", "tensors"}. Raises InputError `checkpoints.cannot_combine`, `checkpoints.ranks_differ`, and those of open_adapter.
    """
    opened = [open_adapter(Path(folder), weight) for folder, weight in zip(adapters, weights, strict=True)]
    rank = _common_rank(opened)
    shapes = _shapes(opened)
    folder = Path(target)
    require_absent(folder)
    require_space(folder, sum(math.prod(shape) * 4 for shape in shapes.values()) + 2**24)
    first = read_description(opened[0].folder)
    targets = sorted({split_key(name)[0].rpartition(".")[2] for name in shapes})
    settings = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = {**opened[0].config, **settings, "target_modules": targets, "layers_to_transform": None}
    with stage(folder, {"combination": list(adapters), "weights": list(weights), "method": method}) as part:
        values = _combined(opened, shapes, _function(method, density), seed, progress)
        write_shard(part / WEIGHTS, {name: ("F32", shape) for name, shape in shapes.items()}, values, {"format": "pt"})
        write_json(part / CONFIG, config)
        copy_tokenizer(opened[0].folder, part)
        write_chat_template(part, first.get("prompt_template"))
        describe(
            part,
            kind="adapter",
            run=None,
            checkpoint=None,
            base_model=first.get("base_model") or {"path": config.get("base_model_name_or_path"), "fingerprint": None},
            prompt_template=first.get("prompt_template"),
            system=first.get("system"),
            dtype="F32",
            details={
                "combined": {"method": method, "density": density, "seed": seed},
                "adapters": [{"path": str(item.folder), "weight": item.weight} for item in opened],
            },
        )
    return {"path": str(folder), "tensors": len(shapes)}


def _common_rank(opened: Sequence[Adapter]) -> int:
    """The rank of every module of every adapter. Raises InputError where one is not plain LoRA or the ranks differ."""
    ranks = set()
    for adapter in opened:
        for name, tensor in adapter.tensors.items():
            part = split_key(name)[1]
            if part not in _PARTS:
                raise InputError("checkpoints.cannot_combine", feature=part or "modules_to_save", name=name)
            if "_A" in part:
                ranks.add(tensor.shape[0])
    if len(ranks) != 1:
        raise InputError("checkpoints.ranks_differ", ranks=", ".join(map(str, sorted(ranks))))
    return ranks.pop()


def _shapes(opened: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Every tensor of any adapter, A before B, and its shape, on which they must agree."""
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in opened:
        for name, tensor in adapter.tensors.items():
            known = shapes.setdefault(name, tensor.shape)
            if known != tensor.shape:
                raise InputError("checkpoints.shape_differs", name=name, base=str(known), adapter=str(tensor.shape))
    return dict(sorted(shapes.items()))


def _combined(
    opened: Sequence[Adapter],
    shapes: Mapping[str, tuple[int, ...]],
    function: Callable[[list[Any], Any], Any],
    seed: int,
    progress: Progress,
) -> Iterator[Array]:
    """One tensor after the other; of the adapters' own only those of one name are in memory."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, name in enumerate(shapes):
            module, part = split_key(name)
            tensors, factors = [], []
            for adapter in opened:
                if name in adapter.tensors:
                    stored = adapter.tensors[name]
                    tensors.append(torch.from_numpy(widen(stored.read(), stored.dtype)))
                    weight = adapter.weight * scale_of(adapter.config, module)
                    # Half of it on each side of the product; the sign on one side only.
                    factors.append(math.copysign(math.sqrt(abs(weight)), weight if "_A" in part else 1.0))
            yield np.asarray(function(tensors, torch.tensor(factors)).numpy(), dtype=np.float32)
            progress.update(number + 1, len(shapes), message("checkpoints.progress.combine"))


def _function(method: str, density: float) -> Callable[[list[Any], Any], Any]:
    """peft's function of that name, with `density` given to it."""
    from peft.utils import merge_utils

    if method not in METHODS or method == SUM or not 0 < density < 1:
        raise InputError("checkpoints.bad_method", method=method, density=density)
    chosen = getattr(merge_utils, method)
    return lambda tensors, factors: chosen(tensors, factors, density)
