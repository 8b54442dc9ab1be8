"""How DeepSpeed ZeRO lays fp32 masters and optimizer moments out over ranks: by name, the pieces of files that each lies in.

Knows the folders that ZeRO-1, 2 and 3 write; reads no tensor, builds no engine and writes nothing. The layouts are
DeepSpeed's own (`runtime/zero/stage_1_and_2.py`, `stage3.py`, versions 0.15 to 0.19).
"""

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from core.checkpoints.reader import read_torch_file
from core.checkpoints.tensors import DiskTensor
from core.checkpoints.transfer import Piece
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


class Source(Protocol):
    """A checkpoint whose tensors can be written anew in another form. `ZeroFolder` says what its parts are."""

    @property
    def world_size(self) -> int: ...

    @property
    def stage(self) -> int:
        """ZeRO stage; 0: a plain file."""

    @property
    def parameters(self) -> list[Parameter]: ...

    @property
    def parameter_groups(self) -> list[dict[str, Any]]: ...

    @property
    def keys(self) -> list[str]: ...

    @property
    def model_states(self) -> dict[str, Any]: ...

    @property
    def outer(self) -> dict[str, Any]: ...

    @property
    def prefix(self) -> str: ...

    @property
    def clip_grad(self) -> float | None: ...

    @property
    def sub_group_elements(self) -> int: ...

    @property
    def module(self) -> Mapping[str, Any]: ...

    def shared_state(self, stage: int) -> dict[str, Any]: ...

    def dtype(self, key: str) -> str: ...

    def scalars(self, group: int) -> dict[str, Any]: ...

    def pieces(self, name: str, key: str) -> list[Piece]: ...

    def frozen(self) -> "OrderedDict[str, torch.Tensor]": ...


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
    def outer(self) -> dict[str, Any]:
        """The first rank's optimizer file, its objects as torch and DeepSpeed make them; beside its state it holds settings."""
        outer: dict[str, Any] = load(self.optimizer_files[0])
        return outer

    @property
    def optimizer_state(self) -> dict[str, Any]:
        """What the first rank's optimizer says; beside its tensors all ranks say the same."""
        state: dict[str, Any] = self.outer["optimizer_state_dict"]
        return state

    @cached_property
    def layouts(self) -> list[dict[str, Any]]:
        """`optimizer_state_dict` of every rank, its tensors on the disk."""
        return [read_torch_file(file)["optimizer_state_dict"] for file in self.optimizer_files]

    @cached_property
    def stage(self) -> int:
        stage = self.optimizer_state["zero_stage"]
        return int(getattr(stage, "value", stage))

    @property
    def sub_group_elements(self) -> int:
        """Limit of a ZeRO-3 sub-group."""
        return int(self.zero_config.get("sub_group_size", 10**9))

    @cached_property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters of each optimizer parameter group (lr, betas, …), without its `params`."""
        groups = self._inner["param_groups"]
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    @property
    def _inner(self) -> dict[str, Any]:
        return self._inner_of(self.optimizer_state)

    def _inner_of(self, state: dict[str, Any]) -> dict[str, Any]:
        inner: dict[str, Any] = state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
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

    def _flat(self, rank: int, flat: int, key: str) -> DiskTensor:
        states = self.layouts[rank]
        if key != MASTER:
            tensor: DiskTensor = self._inner_of(states)["state"][flat][key]
            return tensor
        name = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        master: DiskTensor = states[name][flat]
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

    def pieces(self, name: str, key: str) -> list[Piece]:
        """Where a parameter's master or moment lies, in order."""
        return [
            Piece(self._flat(piece.rank, piece.flat, key), piece.offset, piece.offset + piece.count)
            for piece in self._pieces[name]
        ]

    def dtype(self, key: str) -> str:
        """Type of all masters, or of one of the moments."""
        return self._flat(0, 0, key).dtype

    @cached_property
    def module(self) -> Mapping[str, Any]:
        """The model's own weights in the first file, tensors on the disk; in ZeRO-3 placeholders and buffers."""
        module: Mapping[str, Any] = read_torch_file(self.model_files[0])["module"]
        return module

    def frozen(self) -> "OrderedDict[str, torch.Tensor]":
        """Frozen weights that were stored, whole: fragments in ZeRO-3, inside `module` in ZeRO-1/2."""
        import torch

        trained = {parameter.name for parameter in self.parameters}
        states = self.model_states
        if self.stage != 3:
            buffers = set(states.get("buffer_names", []))
            return OrderedDict((n, v) for n, v in states["module"].items() if n not in trained and n not in buffers)
        if not states.get("frozen_param_fragments"):
            return OrderedDict()
        ranks = [load(file)["frozen_param_fragments"] for file in self.model_files]
        return OrderedDict(
            (name, torch.cat([rank[name].flatten() for rank in ranks])[: math.prod(shape)].view(tuple(shape)))
            for name, shape in states["frozen_param_shapes"].items()
        )

    def shared_state(self, stage: int) -> dict[str, Any]:
        """What every rank's optimizer state says alike in a folder of this stage: the loss scaler and its flags."""
        del stage
        kept = ("loss_scaler", "dynamic_loss_scale", "overflow")
        return {key: self.optimizer_state[key] for key in kept if key in self.optimizer_state}

    @property
    def prefix(self) -> str:
        """Begins the names of the optimizer files."""
        return self.optimizer_files[0].name.split("zero_pp_rank_")[0]

    @property
    def clip_grad(self) -> float | None:
        """Norm that gradients are clipped to; None: what the engine is set to."""
        clip: float | None = self.optimizer_state.get(
            "clip_grad", self.model_states["ds_config"].get("gradient_clipping", 0.0)
        )
        return clip


def padded(elements: int, parts: int) -> int:
    """Elements of one of `parts` equal parts of a ZeRO-1/2 group, padding included."""
    return math.ceil(elements / (parts * ALIGNMENT)) * ALIGNMENT


def _is_flat(value: Any) -> bool:
    """Per-element state is a 1-D tensor; scalars such as AdamW's `step` have no dimension."""
    return getattr(value, "dim", None) is not None and value.dim() == 1
