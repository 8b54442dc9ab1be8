"""Writes a ZeRO folder of any number of ranks and any stage from the masters and moments of another checkpoint.

First every file is laid out with rooms for its tensors, then each tensor is moved from its pieces into its rooms: a tensor is read
once, and none is in memory whole. The layout here is DeepSpeed's as it writes it; `zero_layout` has it as it is read.
"""

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.checkpoints.tensors import DiskTensor
from core.checkpoints.torch_file import Room, TorchFile
from core.checkpoints.transfer import Move, Piece, Place
from core.checkpoints.zero_layout import MASTER, Parameter, Source, padded

if TYPE_CHECKING:
    import torch

_MODULE: Final = "module"
"""Key of what the model itself computes with, beside the masters and moments."""
_DTYPES: Final = {"bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True, slots=True)
class _Slot:
    """Elements `start … start + count` of a tensor go to `offset` of `room`."""

    room: Room
    start: int
    offset: int
    count: int


class FolderWriter:
    """Lays out the files of all new ranks. Then `moves` fill them."""

    def __init__(self, source: Source, target: Path, world_size: int, stage: int, rates: list[float] | None) -> None:
        """`rates`: learning rates to write into the parameter groups; None: those of the source."""
        self.source, self.target, self.world_size, self.stage = source, target, world_size, stage
        self._rates = rates
        self._groups = [
            [parameter for parameter in source.parameters if parameter.group == group]
            for group in range(len(source.parameter_groups))
        ]
        self._dtypes = {key: source.dtype(key) for key in source.keys}
        self._slots: dict[tuple[str, str], list[_Slot]] = defaultdict(list)
        self._others: dict[DiskTensor, Room] = {}
        """Tensors that are copied as they are. Tied weights lie in one place, and stay so."""
        self._file_of: dict[int, TorchFile] = {}
        self.files: list[TorchFile] = []

    def lay_out(self, states: dict[str, Any]) -> None:
        """Make every file. `states`: the model states, their counters carried over."""
        sub_groups = self._sub_groups() if self.stage == 3 else []
        self._lay_out_model(states, sub_groups)
        outer = {key: value for key, value in self.source.outer.items() if key != "optimizer_state_dict"}
        for rank in range(self.world_size):
            state = self._stage3_state(rank, sub_groups) if self.stage == 3 else self._stage12_state(rank)
            content = {**outer, "optimizer_state_dict": state, "ds_config": self._config()}
            self._make(f"{self.source.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", content)

    def moves(self) -> tuple[list[Move], list[Move]]:
        """What fills the files: masters and moments, all of one key and then of the next; and the rest."""
        kept = [
            self._move(self.source.pieces(parameter.name, key), self._dtypes[key], self._slots[parameter.name, key])
            for key in self.source.keys
            for parameter in self.source.parameters
        ]
        cast = [
            self._move(self.source.pieces(name, MASTER), slots[0].room.dtype, slots)
            for (name, key), slots in self._slots.items()
            if key == _MODULE
        ]
        whole = [
            self._move([Piece(tensor, 0, tensor.numel)], tensor.dtype, [_Slot(room, 0, 0, tensor.numel)])
            for tensor, room in self._others.items()
        ]
        return kept, cast + whole

    def _move(self, pieces: Sequence[Piece], dtype: str, slots: Sequence[_Slot]) -> Move:
        ordered = sorted(slots, key=lambda slot: slot.start)
        places = [
            Place(self._file_of[id(slot.room)], slot.room, slot.offset, slot.count) for slot in ordered if slot.count
        ]
        return Move(pieces, places, dtype)

    def _make(self, name: str, content: dict[str, Any]) -> None:
        file = TorchFile(self.target / name, content)
        self.files.append(file)
        self._file_of |= dict.fromkeys(map(id, file.rooms), file)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = copy.deepcopy(dict(self.source.model_states["ds_config"]))
        config.setdefault("zero_optimization", {})["stage"] = self.stage
        return config

    def _shared_state(self) -> dict[str, Any]:
        """What every rank's optimizer state says alike, in any stage."""
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return {**self.source.shared_state(self.stage), "zero_stage": ZeroStageEnum(self.stage)}

    def _stage12_state(self, rank: int) -> dict[str, Any]:
        from deepspeed.utils.tensor_fragment import fragment_address

        masters, paddings, mappings = [], [], []
        inner: dict[str, Any] = {
            "state": {},
            "param_groups": self._parameter_groups([[g] for g in range(len(self._groups))]),
        }
        for index, members in enumerate(self._groups):
            total = sum(member.elements for member in members)
            part = padded(total, self.world_size)
            padding = max(0, min(part, (rank + 1) * part - total))
            flats = {key: Room(dtype, (part,)) for key, dtype in self._dtypes.items()}
            flats[MASTER] = Room(self._dtypes[MASTER], (part - padding,))
            mapping: OrderedDict[str, Any] = OrderedDict()
            begin = 0
            for member in members:
                low, high = max(begin, rank * part), min(begin + member.elements, (rank + 1) * part)
                if low < high:
                    mapping[member.name] = fragment_address(numel=high - low, start=low - rank * part)
                    for key, room in flats.items():
                        self._slots[member.name, key].append(_Slot(room, low - begin, low - rank * part, high - low))
                begin += member.elements
            masters.append(flats.pop(MASTER))
            inner["state"][index] = {**copy.deepcopy(self.source.scalars(index)), **flats}
            paddings.append(padding)
            mappings.append(mapping)
        return {
            **self._shared_state(),
            **({} if self.source.clip_grad is None else {"clip_grad": self.source.clip_grad}),
            "base_optimizer_state": inner,
            "single_partition_of_fp32_groups": masters,
            "group_paddings": paddings,
            "partition_count": [self.world_size] * len(self._groups),
            "ds_version": self.source.model_states["ds_version"],
            "param_slice_mappings": mappings,
        }

    def _sub_groups(self) -> list[list[Parameter]]:
        """ZeRO-3's own rule (`_create_fp16_sub_groups`): close a sub-group once a rank's share of it reaches the limit."""
        limit = self.source.sub_group_elements
        result: list[list[Parameter]] = []
        for members in self._groups:
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
        owned = [[i for i, sub in enumerate(sub_groups) if sub[0].group == g] for g in range(len(self._groups))]
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

    def _shares(self, sub: Sequence[Parameter], key: str, rank: int) -> Room:
        """A rank's shares of all parameters of a sub-group, end to end, each padded with zeros."""
        flat = Room(self._dtypes[key], (sum(self._share(member) for member in sub),))
        offset = 0
        for member in sub:
            share = self._share(member)
            count = min(share, max(0, member.elements - rank * share))
            self._slots[member.name, key].append(_Slot(flat, rank * share, offset, count))
            offset += share
        return flat

    def _parameter_groups(self, flats: list[list[int]]) -> list[dict[str, Any]]:
        groups = copy.deepcopy(self.source.parameter_groups)
        rates: list[Any] = self._rates or [group.get("lr") for group in groups]
        return [
            {**group, "lr": rate, "params": flats[i]} for i, (group, rate) in enumerate(zip(groups, rates, strict=True))
        ]

    def _lay_out_model(self, states: dict[str, Any], sub_groups: list[list[Parameter]]) -> None:
        import torch

        states = {**states, "dp_world_size": self.world_size, "ds_config": self._config()}
        layout = sub_groups if self.stage == 3 else self._groups
        states["param_shapes"] = [OrderedDict((p.name, torch.Size(p.shape)) for p in members) for members in layout]
        frozen = self.source.frozen()
        if self.stage != 3:
            states[_MODULE] = self._whole_module(frozen)
            states["frozen_param_shapes"] = states["frozen_param_fragments"] = None
            self._make("mp_rank_00_model_states.pt", states)
            return
        states[_MODULE] = self._empty_module()
        for rank in range(self.world_size):
            if frozen:
                states["frozen_param_shapes"] = OrderedDict((name, value.shape) for name, value in frozen.items())
                states["frozen_param_fragments"] = OrderedDict(
                    (name, _share_of(value, rank, self.world_size)) for name, value in frozen.items()
                )
            self._make(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", states)

    def _whole_module(self, frozen: "OrderedDict[str, torch.Tensor]") -> "OrderedDict[str, Any]":
        if self.source.stage != 3:
            return OrderedDict((name, self._copied(name, value)) for name, value in self.source.module.items())
        dtype = self._model_dtype()
        whole: OrderedDict[str, Any] = OrderedDict(frozen)
        for parameter in self.source.parameters:
            room = whole[parameter.name] = Room(dtype, parameter.shape)
            self._slots[parameter.name, _MODULE].append(_Slot(room, 0, 0, parameter.elements))
        shared = self.source.model_states.get("shared_params") or {}
        for name, value in self.source.model_states[_MODULE].items():  # Buffers, and the other names of tied weights.
            whole.setdefault(name, whole.get(shared.get(name, ""), value))
        return whole

    def _copied(self, name: str, value: Any) -> Any:
        """A room for a weight of the source; one that has gaps where it lies is taken as torch reads it."""
        if isinstance(value, DiskTensor) and value.is_contiguous:
            return self._others.setdefault(value, Room(value.dtype, value.shape))
        return self.source.model_states[_MODULE][name]

    def _empty_module(self) -> "OrderedDict[str, torch.Tensor]":
        """ZeRO-3 keeps only buffers whole; each parameter is an empty placeholder."""
        import torch

        module: OrderedDict[str, torch.Tensor] = self.source.model_states[_MODULE]
        if self.source.stage == 3:
            return module
        buffers = set(self.source.model_states.get("buffer_names", []))
        return OrderedDict(
            (name, value if name in buffers else torch.empty(0, dtype=value.dtype)) for name, value in module.items()
        )

    def _model_dtype(self) -> str:
        config = self.source.model_states["ds_config"]
        return next((d for key, d in _DTYPES.items() if config.get(key, {}).get("enabled") is True), "F32")


def _share_of(value: "torch.Tensor", rank: int, world_size: int) -> "torch.Tensor":
    """A rank's share of a frozen weight, padded with zeros to the size of every other rank's."""
    import torch

    share = math.ceil(value.numel() / world_size)
    part = torch.zeros(share, dtype=value.dtype)
    piece = value.flatten()[rank * share : (rank + 1) * share]
    part[: piece.numel()] = piece
    return part
