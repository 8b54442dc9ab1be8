"""Cuts a ZeRO checkpoint anew for another number of ranks or another ZeRO stage, bit for bit, into a new folder.

The source is only read. One rank's file is built in memory at a time; everything else stays memory-mapped. The result is
an ordinary checkpoint, loaded by DeepSpeed's ordinary path. Counters of the training loop are `core.checkpoints.counters`.
A plain file holds everything whole: there only the counters change.
"""

import copy
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.checkpoints.counters import check_counters, learning_rates, rescale_counters
from core.checkpoints.zero_layout import MASTER, Parameter, ZeroFolder, load, padded
from core.errors import InputError
from core.files import require_absent, require_space, tree_size_bytes
from core.messages import message
from core.runs.job import Progress

if TYPE_CHECKING:
    import torch

_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class ReshapePlan:
    """What reshaping a checkpoint would do, known before anything is written."""

    source: str
    from_world_size: int
    to_world_size: int
    from_stage: int
    to_stage: int
    parameters: int
    """Trained parameters, elements."""
    size_bytes: int
    """Of the source, and about that of the result."""
    from_iteration: int | None
    to_iteration: int | None
    """Iterations are counted per rank, so the same optimizer step has another number on another number of ranks."""


def plan_reshape(
    source: Path, world_size: int, *, stage: int | None = None, accumulative_counts: int | None = None
) -> ReshapePlan:
    """Read the source's layout and say what would happen. Raises InputError for what is not covered."""
    folder = ZeroFolder(source)
    if world_size < 1:
        raise InputError("reshape.bad_world_size", world_size=world_size)
    if stage not in (None, 1, 2, 3):
        raise InputError("reshape.bad_stage", stage=stage)
    meta = folder.model_states.get("meta") or {}
    iteration = meta.get("iter")
    if iteration is not None:
        check_counters(iteration, folder.world_size, world_size, accumulative_counts)
    return ReshapePlan(
        source=str(source),
        from_world_size=folder.world_size,
        to_world_size=world_size,
        from_stage=folder.stage,
        to_stage=stage or folder.stage,
        parameters=sum(parameter.elements for parameter in folder.parameters),
        size_bytes=tree_size_bytes(source),
        from_iteration=iteration,
        to_iteration=None if iteration is None else iteration * folder.world_size // world_size,
    )


def reshape(
    source: str,
    target: str,
    world_size: int,
    *,
    progress: Progress,
    stage: int | None = None,
    accumulative_counts: int | None = None,
    stretch: Fraction = Fraction(1),
) -> dict[str, Any]:
    """Write `source` for `world_size` ranks to the new folder `target` and compare every master and moment. A job function.

    `stretch`: see `core.checkpoints.counters.rescale_counters`.

    Returns the plan with `tensors_verified` and `digest`. Raises InputError (not covered), ConflictError (target exists),
    MachineError (no space). A failed or cancelled reshape leaves nothing at `target`.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's classes are unpickled here; no GPU is touched.
    source_path, target_path = Path(source), Path(target)
    plan = plan_reshape(source_path, world_size, stage=stage, accumulative_counts=accumulative_counts)
    require_absent(target_path)
    require_space(target_path.parent, plan.size_bytes)
    partial = target_path.with_name(f".{target_path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        folder = ZeroFolder(source_path)
        writer = _Writer(folder, partial, world_size, plan.to_stage, stretch)
        for done in writer.write():
            progress.update(done, world_size + 1, message("reshape.writing", rank=done, ranks=world_size))
        digest, count = _verify(folder, ZeroFolder(partial))
        progress.update(world_size + 1, world_size + 1, message("reshape.verified", tensors=count))
        if target_path.is_dir():
            target_path.rmdir()  # An empty folder counts as nothing.
        partial.rename(target_path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**asdict(plan), "target": target, "tensors_verified": count, "digest": digest}


def rescale_file(
    source: Path, target: Path, old: int, new: int, *, stretch: Fraction = Fraction(1), progress: Progress
) -> None:
    """Write the plain checkpoint `source` of `old` ranks for `new` ranks to the new file `target`: other counters, same tensors.

    Raises InputError (not readable, an unknown schedule), ConflictError (target exists), MachineError (no space).
    """
    import torch

    require_absent(target)
    require_space(target.parent, source.stat().st_size)
    states = dict(load(source))
    rates = _carry_counters(states, old, new, stretch)
    if rates:
        groups = states["optimizer"]["param_groups"]
        changed = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
        states["optimizer"] = {**states["optimizer"], "param_groups": changed}
    progress.update(0, 1, message("reshape.writing", rank=1, ranks=1))
    partial = target.with_name(f".{target.name}.partial")
    try:
        torch.save(states, partial)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _carry_counters(states: dict[str, Any], old: int, new: int, stretch: Fraction) -> list[float] | None:
    """Carry the counters over in place; the optimizer's learning rates there, None if they stay. Raises InputError."""
    rescale_counters(states, old, new, stretch)
    if old == new and stretch == 1:
        return None
    rates = learning_rates(states)
    if stretch != 1 and rates is None and states.get("param_schedulers"):
        raise InputError("reshape.unknown_schedule")
    return rates


def _verify(before: ZeroFolder, after: ZeroFolder) -> tuple[str, int]:
    """Compare every master and moment of two folders. Returns one digest of all and how many tensors were compared."""
    import xxhash

    total = xxhash.xxh3_128()
    count = 0
    if [(p.name, p.shape) for p in before.parameters] != [(p.name, p.shape) for p in after.parameters]:
        raise InputError("reshape.differs", name="parameters", key="shape")
    for parameter in before.parameters:
        for key in before.keys:
            hashes = [xxhash.xxh3_128_digest(f.read(parameter, key).numpy()) for f in (before, after)]
            if hashes[0] != hashes[1]:
                raise InputError("reshape.differs", name=parameter.name, key=key)
            total.update(hashes[0])
            count += 1
    return total.hexdigest(), count


class _Writer:
    """Writes the files of all new ranks, one rank at a time."""

    def __init__(self, source: ZeroFolder, target: Path, world_size: int, stage: int, stretch: Fraction) -> None:
        self.source, self.target, self.world_size, self.stage, self.stretch = source, target, world_size, stage, stretch
        self.groups = [
            [parameter for parameter in source.parameters if parameter.group == group]
            for group in range(len(source.parameter_groups))
        ]
        self._rates = _carry_counters(dict(source.model_states), source.world_size, world_size, stretch)
        first = source.optimizer_files[0].name
        self.prefix = first.split("zero_pp_rank_")[0]

    def write(self) -> Iterator[int]:
        """Write everything; yields the number of ranks written so far."""
        import torch

        sub_groups = self._sub_groups() if self.stage == 3 else []
        self._write_model_states(sub_groups)
        outer = {key: value for key, value in _load_outer(self.source).items() if key != "optimizer_state_dict"}
        for rank in range(self.world_size):
            state = self._stage3_state(rank, sub_groups) if self.stage == 3 else self._stage12_state(rank)
            file = self.target / f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({**outer, "optimizer_state_dict": state, "ds_config": self._config()}, file)
            del state
            yield rank + 1

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = copy.deepcopy(dict(self.source.model_states["ds_config"]))
        config.setdefault("zero_optimization", {})["stage"] = self.stage
        return config

    def _shared_state(self) -> dict[str, Any]:
        """What every rank's optimizer state says alike, in any stage."""
        from deepspeed.runtime.zero.config import ZeroStageEnum

        old = self.source.optimizer_states[0]
        kept: dict[str, Any] = {
            key: old[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in old
        }
        return {**kept, "zero_stage": ZeroStageEnum(self.stage)}

    def _stage12_state(self, rank: int) -> dict[str, Any]:
        from deepspeed.utils.tensor_fragment import fragment_address

        old = self.source.optimizer_states[0]
        masters, paddings, mappings = [], [], []
        inner: dict[str, Any] = {
            "state": {},
            "param_groups": self._parameter_groups([[g] for g in range(len(self.groups))]),
        }
        for index, members in enumerate(self.groups):
            total = sum(member.elements for member in members)
            part = padded(total, self.world_size)
            flats = {key: self._range(members, key, rank * part, part) for key in self.source.keys}
            padding = max(0, min(part, (rank + 1) * part - total))
            masters.append(flats.pop(MASTER)[: part - padding].clone())
            paddings.append(padding)
            inner["state"][index] = {**copy.deepcopy(self.source.scalars(index)), **flats}
            mapping: OrderedDict[str, Any] = OrderedDict()
            begin = 0
            for member in members:
                low, high = max(begin, rank * part), min(begin + member.elements, (rank + 1) * part)
                if low < high:
                    mapping[member.name] = fragment_address(numel=high - low, start=low - rank * part)
                begin += member.elements
            mappings.append(mapping)
        return {
            **self._shared_state(),
            "clip_grad": old.get("clip_grad", self.source.model_states["ds_config"].get("gradient_clipping", 0.0)),
            "base_optimizer_state": inner,
            "single_partition_of_fp32_groups": masters,
            "group_paddings": paddings,
            "partition_count": [self.world_size] * len(self.groups),
            "ds_version": self.source.model_states["ds_version"],
            "param_slice_mappings": mappings,
        }

    def _range(self, members: Sequence[Parameter], key: str, low: int, count: int) -> "torch.Tensor":
        """Elements `low … low + count` of a group put end to end, zeros behind its end."""
        import torch

        flat = torch.zeros(count, dtype=torch.float32)
        begin = 0
        for member in members:
            start, stop = max(begin, low), min(begin + member.elements, low + count)
            if start < stop:
                self.source.read_into(flat[start - low : stop - low], member.name, key, start - begin)
            begin += member.elements
        return flat

    def _sub_groups(self) -> list[list[Parameter]]:
        """ZeRO-3's own rule (`_create_fp16_sub_groups`): close a sub-group once a rank's share of it reaches the limit."""
        limit = self.source.sub_group_elements
        result: list[list[Parameter]] = []
        for members in self.groups:
            is_one = sum(self._share(member) for member in members) <= limit
            current: list[Parameter] = []
            for member in members:
                current.append(member)
                if not is_one and sum(self._share(each) for each in current) >= limit:
                    result.append(current)
                    current = []
            if current:
                result.append(current)
        return result

    def _share(self, parameter: Parameter) -> int:
        """Elements of a parameter that one rank holds in ZeRO-3, padding included."""
        return math.ceil(parameter.elements / self.world_size)

    def _stage3_state(self, rank: int, sub_groups: list[list[Parameter]]) -> dict[str, Any]:
        owned = [[i for i, sub in enumerate(sub_groups) if sub[0].group == g] for g in range(len(self.groups))]
        inner: dict[str, Any] = {"state": {}, "param_groups": self._parameter_groups(owned)}
        masters = []
        for index, sub in enumerate(sub_groups):
            flats = {key: self._shares(sub, key, rank) for key in self.source.keys}
            masters.append(flats.pop(MASTER))
            inner["state"][index] = {**copy.deepcopy(self.source.scalars(sub[0].group)), **flats}
        return {
            **self._shared_state(),
            "partition_count": self.world_size,
            "optimizer_state_dict": inner,
            "fp32_flat_groups": masters,
        }

    def _shares(self, sub: Sequence[Parameter], key: str, rank: int) -> "torch.Tensor":
        """A rank's shares of all parameters of a sub-group, end to end, each padded with zeros."""
        import torch

        flat = torch.zeros(sum(self._share(member) for member in sub), dtype=torch.float32)
        offset = 0
        for member in sub:
            share = self._share(member)
            count = min(share, max(0, member.elements - rank * share))
            if count:
                self.source.read_into(flat[offset : offset + count], member.name, key, rank * share)
            offset += share
        return flat

    def _parameter_groups(self, flats: list[list[int]]) -> list[dict[str, Any]]:
        groups = copy.deepcopy(self.source.parameter_groups)
        rates: list[Any] = self._rates or [group.get("lr") for group in groups]
        return [
            {**group, "lr": rate, "params": flats[i]} for i, (group, rate) in enumerate(zip(groups, rates, strict=True))
        ]

    def _write_model_states(self, sub_groups: list[list[Parameter]]) -> None:
        import torch

        states = dict(self.source.model_states)
        states["dp_world_size"], states["ds_config"] = self.world_size, self._config()
        layout = sub_groups if self.stage == 3 else self.groups
        states["param_shapes"] = [OrderedDict((p.name, torch.Size(p.shape)) for p in members) for members in layout]
        rescale_counters(states, self.source.world_size, self.world_size, self.stretch)
        frozen = self._frozen()
        if self.stage != 3:
            states["module"] = self._whole_module(frozen)
            states["frozen_param_shapes"] = states["frozen_param_fragments"] = None
            torch.save(states, self.target / "mp_rank_00_model_states.pt")
            return
        states["module"] = self._empty_module()
        for rank in range(self.world_size):
            if frozen:
                states["frozen_param_shapes"] = OrderedDict((name, value.shape) for name, value in frozen.items())
                states["frozen_param_fragments"] = OrderedDict(
                    (name, _share_of(value, rank, self.world_size)) for name, value in frozen.items()
                )
            torch.save(states, self.target / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")

    def _frozen(self) -> "OrderedDict[str, torch.Tensor]":
        """Frozen weights stored in the source, whole: fragments in ZeRO-3, inside `module` in ZeRO-1/2."""
        import torch

        trained = {parameter.name for parameter in self.source.parameters}
        states = self.source.model_states
        if self.source.stage != 3:
            buffers = set(states.get("buffer_names", []))
            return OrderedDict((n, v) for n, v in states["module"].items() if n not in trained and n not in buffers)
        if not states.get("frozen_param_fragments"):
            return OrderedDict()
        ranks = [load(file)["frozen_param_fragments"] for file in self.source.model_files]
        return OrderedDict(
            (name, torch.cat([rank[name].flatten() for rank in ranks])[: math.prod(shape)].view(tuple(shape)))
            for name, shape in states["frozen_param_shapes"].items()
        )

    def _whole_module(self, frozen: "OrderedDict[str, torch.Tensor]") -> "OrderedDict[str, torch.Tensor]":
        if self.source.stage != 3:
            module: OrderedDict[str, torch.Tensor] = self.source.model_states["module"]
            return module
        dtype = self._model_dtype()
        whole = OrderedDict(frozen)
        for parameter in self.source.parameters:
            whole[parameter.name] = self.source.read(parameter, MASTER).view(parameter.shape).to(dtype)
        known = {*whole}
        whole.update((n, v) for n, v in self.source.model_states["module"].items() if n not in known)
        return whole

    def _empty_module(self) -> "OrderedDict[str, torch.Tensor]":
        """ZeRO-3 keeps only buffers whole; each parameter is an empty placeholder."""
        import torch

        if self.source.stage == 3:
            module: OrderedDict[str, torch.Tensor] = self.source.model_states["module"]
            return module
        buffers = set(self.source.model_states.get("buffer_names", []))
        return OrderedDict(
            (name, value if name in buffers else torch.empty(0, dtype=value.dtype))
            for name, value in self.source.model_states["module"].items()
        )

    def _model_dtype(self) -> "torch.dtype":
        import torch

        config = self.source.model_states["ds_config"]
        name = next((d for key, d in _DTYPES.items() if config.get(key, {}).get("enabled") is True), "float32")
        dtype: torch.dtype = getattr(torch, name)
        return dtype


def _share_of(value: "torch.Tensor", rank: int, world_size: int) -> "torch.Tensor":
    """A rank's share of a frozen weight, padded with zeros to the size of every other rank's."""
    import torch

    share = math.ceil(value.numel() / world_size)
    part = torch.zeros(share, dtype=value.dtype)
    piece = value.flatten()[rank * share : (rank + 1) * share]
    part[: piece.numel()] = piece
    return part


def _load_outer(source: ZeroFolder) -> dict[str, Any]:
    outer: dict[str, Any] = load(source.optimizer_files[0])
    return outer
