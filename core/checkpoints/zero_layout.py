"""How DeepSpeed ZeRO lays fp32 masters and optimizer moments out over ranks, read as whole tensors by name.

Reads the folders that ZeRO-1, 2 and 3 write, memory-mapped; builds no engine and writes nothing. The layouts are
DeepSpeed's own (`runtime/zero/stage_1_and_2.py`, `stage3.py`, versions 0.15 to 0.19).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.errors import InputError

if TYPE_CHECKING:
    import torch

MASTER: Final = "fp32"
"""Key of the fp32 master weights, beside the optimizer's own keys (`exp_avg`, `exp_avg_sq`, …)."""
ALIGNMENT: Final = 2
"""ZeRO-1/2 pad a group to a multiple of this × ranks (`nccl_start_alignment_factor`)."""
_RANK: Final = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One trained parameter."""

    name: str
    shape: tuple[int, ...]
    group: int
    """Index of its optimizer parameter group."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements `start … start + count` of a parameter lie at `offset` of flat tensor `flat` of rank `rank`."""

    rank: int
    flat: int
    offset: int
    start: int
    count: int


def load(file: Path) -> Any:
    """One file of a checkpoint, tensors memory-mapped. Raises InputError if it is cut or not readable."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise InputError("reshape.unreadable", path=str(file), reason=str(error).splitlines()[0]) from error


def ranked_files(folder: Path, ending: str) -> list[Path]:
    """Files of all ranks, by rank. Raises InputError if a rank is missing or tensor parallelism was used."""
    files: dict[int, Path] = {}
    for file in folder.glob(f"*{ending}"):
        if (found := _RANK.search(file.name)) is None:
            continue
        if int(found[2]) != 0:
            raise InputError("reshape.tensor_parallel", path=str(folder))
        files[int(found[1])] = file
    missing = sorted(set(range(max(files, default=-1) + 1)) - set(files))
    if missing:
        raise InputError("reshape.missing_rank", path=str(folder), rank=missing[0])
    return [files[rank] for rank in sorted(files)]


class ZeroFolder:
    """One DeepSpeed ZeRO checkpoint (XTuner: `iter_N.pth/`). Opening it checks that it is whole and covered.

    Raises InputError: no ZeRO folder, a rank missing, a file cut, tensor parallelism, round-robin gradients.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.optimizer_files = ranked_files(folder, "_optim_states.pt")
        if not self.optimizer_files:
            raise InputError("reshape.not_zero", path=str(folder))
        self.model_files = ranked_files(folder, "_model_states.pt") or sorted(folder.glob("*_model_states.pt"))
        if not self.model_files:
            raise InputError("reshape.not_zero", path=str(folder))
        self.model_states: dict[str, Any] = load(self.model_files[0])
        self._check()

    def _check(self) -> None:
        states = self.model_states
        if states["dp_world_size"] != self.world_size:
            raise InputError(
                "reshape.incomplete", path=str(self.folder), found=self.world_size, wanted=states["dp_world_size"]
            )
        if states.get("mp_world_size", 1) != 1:
            raise InputError("reshape.tensor_parallel", path=str(self.folder))
        if self.zero_config.get("round_robin_gradients"):
            raise InputError("reshape.round_robin", path=str(self.folder))
        if any("expert" in str(key) and value for key, value in states.items() if key == "num_experts"):
            raise InputError("reshape.experts", path=str(self.folder))

    @property
    def world_size(self) -> int:
        return len(self.optimizer_files)

    @property
    def zero_config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.model_states["ds_config"].get("zero_optimization", {})
        return config

    @cached_property
    def optimizer_states(self) -> list[dict[str, Any]]:
        """`optimizer_state_dict` of every rank."""
        return [load(file)["optimizer_state_dict"] for file in self.optimizer_files]

    @cached_property
    def stage(self) -> int:
        stage = self.optimizer_states[0]["zero_stage"]
        return int(getattr(stage, "value", stage))

    @property
    def sub_group_elements(self) -> int:
        return int(self.zero_config.get("sub_group_size", 10**9))

    @cached_property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters of each optimizer parameter group (lr, betas, …), without its `params`."""
        groups = self._inner["param_groups"]
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    @property
    def _inner(self) -> dict[str, Any]:
        return self._inner_of(0)

    def _inner_of(self, rank: int) -> dict[str, Any]:
        states = self.optimizer_states[rank]
        inner: dict[str, Any] = states["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        return inner

    @cached_property
    def _flats_of_group(self) -> list[list[int]]:
        """Indices of the flat tensors (ZeRO-3: sub-groups) that make up each parameter group."""
        groups = self._inner["param_groups"]
        return [list(group["params"]) for group in groups] if self.stage == 3 else [[g] for g in range(len(groups))]

    @cached_property
    def parameters(self) -> list[Parameter]:
        """All trained parameters in the optimizer's order."""
        shapes = self.model_states["param_shapes"]
        return [
            Parameter(name, tuple(shape), group)
            for group, flats in enumerate(self._flats_of_group)
            for flat in flats
            for name, shape in shapes[flat].items()
        ]

    def _flat(self, rank: int, flat: int, key: str) -> "torch.Tensor":
        if key != MASTER:
            tensor: torch.Tensor = self._inner_of(rank)["state"][flat][key]
            return tensor
        name = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        master: torch.Tensor = self.optimizer_states[rank][name][flat]
        return master

    @cached_property
    def keys(self) -> list[str]:
        """What is kept per element: the master weights and each moment of the optimizer."""
        return [MASTER, *(key for key, value in self._state_of(0).items() if _is_flat(value))]

    def scalars(self, group: int) -> dict[str, Any]:
        """Optimizer state of a group that is not per element, such as `step`."""
        flats = self._flats_of_group[group]
        state = self._state_of(flats[0]) if flats else {}
        return {key: value for key, value in state.items() if not _is_flat(value)}

    def _state_of(self, flat: int) -> dict[str, Any]:
        state: dict[str, Any] = self._inner["state"].get(flat, {})
        return state

    @cached_property
    def _pieces(self) -> dict[str, list[_Piece]]:
        return dict(self._pieces_by_parameter() if self.stage == 3 else self._pieces_by_group())

    def _pieces_by_group(self) -> Iterator[tuple[str, list[_Piece]]]:
        """ZeRO-1/2: a group's parameters are put end to end, padded, and cut into equal parts."""
        for group in range(len(self._flats_of_group)):
            members = [parameter for parameter in self.parameters if parameter.group == group]
            part = padded(sum(member.elements for member in members), self.world_size)
            begin = 0
            for member in members:
                end = begin + member.elements
                yield (
                    member.name,
                    [
                        _Piece(rank, group, low - rank * part, low - begin, high - low)
                        for rank in range(begin // part, math.ceil(end / part))
                        if (low := max(begin, rank * part)) < (high := min(end, (rank + 1) * part))
                    ],
                )
                begin = end

    def _pieces_by_parameter(self) -> Iterator[tuple[str, list[_Piece]]]:
        """ZeRO-3: each parameter is cut into equal parts, and a rank puts its parts end to end in sub-groups."""
        for flat, shapes in enumerate(self.model_states["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                elements = math.prod(shape)
                part = math.ceil(elements / self.world_size)
                yield (
                    name,
                    [
                        _Piece(rank, flat, offset, rank * part, min(part, elements - rank * part))
                        for rank in range(self.world_size)
                        if rank * part < elements
                    ],
                )
                offset += part

    def read_into(self, target: "torch.Tensor", name: str, key: str, start: int) -> None:
        """Copy elements `start … start + len(target)` of a parameter's master or moment into the 1-D tensor `target`."""
        stop = start + target.numel()
        for piece in self._pieces[name]:
            low, high = max(start, piece.start), min(stop, piece.start + piece.count)
            if low < high:
                source = self._flat(piece.rank, piece.flat, key)
                begin = piece.offset + low - piece.start
                target[low - start : high - start].copy_(source.detach()[begin : begin + high - low])

    def read(self, parameter: Parameter, key: str) -> "torch.Tensor":
        """A whole master or moment, fp32, flat."""
        import torch

        whole = torch.empty(parameter.elements, dtype=torch.float32)
        self.read_into(whole, parameter.name, key, 0)
        return whole


def padded(elements: int, parts: int) -> int:
    """Elements of one of `parts` equal parts of a ZeRO-1/2 group, padding included."""
    return math.ceil(elements / (parts * ALIGNMENT)) * ALIGNMENT


def _is_flat(value: Any) -> bool:
    """Per-element state is a 1-D tensor; scalars such as AdamW's `step` have no dimension."""
    return getattr(value, "dim", None) is not None and value.dim() == 1
