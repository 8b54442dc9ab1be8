"""How a plain checkpoint (mmengine's `iter_N.pth`, one file) holds weights and moments, by name, as if it were ZeRO of one rank.

Its optimizer counts parameters by number, the frozen ones too, and only those that were trained have a state. Numbers go in the
order of the model (mmengine builds its groups so), as the weights in the file do; that is what names them. Reads headers only.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.checkpoints.reader import read_torch_file
from core.checkpoints.tensors import FLOATS, DiskTensor
from core.checkpoints.transfer import Piece
from core.checkpoints.zero_layout import MASTER, Parameter, load
from core.errors import InputError

if TYPE_CHECKING:
    import torch

NAMES: Final = "param_names"
"""Key of a parameter group, as torch has it for named optimizers: then the numbers need no guess."""
_OWN: Final = frozenset({"state_dict", "optimizer"})
"""What a plain file holds and DeepSpeed keeps elsewhere; all else is the client's in either."""
_MODES: Final = {"BF16": "bf16", "F16": "fp16"}


class PlainFile:
    """A plain checkpoint that training can go on from. Opening it checks that it is covered.

    Raises InputError: no optimizer state, a state without a weight that it clearly belongs to, or of another form than the weight
    (8-bit optimizers), groups without trained parameters, trained weights beside an adapter's.
    """

    stage: int = 0

    def __init__(self, file: Path, world_size: int) -> None:
        """`world_size`: of the run that wrote it; the file does not say."""
        self.file, self.world_size = file, world_size
        content = read_torch_file(file)
        if not isinstance(content, dict) or not content.keys() >= _OWN:
            raise InputError("reshape.no_optimizer", path=str(file))
        self.module: Mapping[str, Any] = content["state_dict"]
        self._optimizer: Mapping[str, Any] = content["optimizer"]
        self._states: Mapping[int, Mapping[str, Any]] = self._optimizer["state"]
        self._number = self._numbers()
        self.parameters: list[Parameter] = [
            Parameter(name, self.module[name].shape, group)
            for group, numbers in enumerate(self._groups)
            for name, number in self._number.items()
            if number in numbers
        ]
        self.keys: list[str] = self._keys()
        self._check_scalars()

    @property
    def _groups(self) -> list[frozenset[int]]:
        return [frozenset(group["params"]) for group in self._optimizer["param_groups"]]

    def _numbers(self) -> dict[str, int]:
        """Name of each trained weight → its number in the optimizer."""
        numbers = sorted(self._states)
        if not numbers or any(not group & set(numbers) for group in self._groups):
            raise InputError("reshape.frozen_group", path=str(self.file))
        groups = self._optimizer["param_groups"]
        if all(NAMES in group for group in groups):
            named = {name: n for group in groups for name, n in zip(group[NAMES], group["params"], strict=True)}
            return {name: number for name, number in named.items() if number in self._states}
        own = self._own_weights()
        if any(".lora_" in name for name in own) and (others := [name for name in own if ".lora_" not in name]):
            raise InputError("reshape.beside_adapter", path=str(self.file), names=", ".join(others[:3]))
        if len(own) != len(numbers):
            raise InputError("reshape.unnamed_state", path=str(self.file), states=len(numbers), weights=len(own))
        return dict(zip(own, numbers, strict=True))

    def _own_weights(self) -> list[str]:
        """Names of weights, tied ones once: the model counts them so."""
        seen: dict[int, str] = {}
        for name, value in self.module.items():
            if isinstance(value, DiskTensor):
                seen.setdefault(value.offset, name)
        return list(seen.values())

    def _keys(self) -> list[str]:
        """The master weights, and what the optimizer keeps for each element."""
        keys: list[str] | None = None
        for parameter in self.parameters:
            state = self._states[self._number[parameter.name]]
            found = [key for key, value in state.items() if isinstance(value, DiskTensor) and value.shape]
            for key, value in ((MASTER, self.module[parameter.name]), *((key, state[key]) for key in found)):
                if value.shape != parameter.shape or value.dtype not in FLOATS or not value.is_contiguous:
                    raise InputError("reshape.unknown_state", path=str(self.file), name=parameter.name, key=key)
            if keys is not None and found != keys:
                raise InputError("reshape.unknown_state", path=str(self.file), name=parameter.name, key=str(found))
            keys = found
        return [MASTER, *(keys or ())]

    def _check_scalars(self) -> None:
        """DeepSpeed keeps one step count a group."""
        for group, _ in enumerate(self._groups):
            said = {
                tuple(
                    (key, _plain(value))
                    for key, value in self._states[self._number[p.name]].items()
                    if key not in self.keys
                )
                for p in self.parameters
                if p.group == group
            }
            if len(said) > 1:
                raise InputError("reshape.uneven_steps", path=str(self.file))

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """The file's objects as torch makes them, tensors mapped."""
        loaded: dict[str, Any] = load(self.file)
        return loaded

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = self._loaded["optimizer"]["param_groups"]
        return [{key: value for key, value in group.items() if key not in ("params", NAMES)} for group in groups]

    def scalars(self, group: int) -> dict[str, Any]:
        name = next(parameter.name for parameter in self.parameters if parameter.group == group)
        state = self._loaded["optimizer"]["state"][self._number[name]]
        return {key: value for key, value in state.items() if key not in self.keys}

    def dtype(self, key: str) -> str:
        """DeepSpeed keeps float32, which every type here fits in."""
        del key
        return "F32"

    def pieces(self, name: str, key: str) -> list[Piece]:
        tensor = self.module[name] if key == MASTER else self._states[self._number[name]][key]
        return [Piece(tensor, 0, math.prod(tensor.shape))]

    @cached_property
    def model_states(self) -> dict[str, Any]:
        """As DeepSpeed's engine saves it (`_common_checkpoint_state`), the client's part taken from the file."""
        client = {key: value for key, value in self._loaded.items() if key not in _OWN}
        settings = {"base_param_settings": self._loaded["optimizer"].get("base_param_settings")}
        places = {
            value.offset: name for name, value in reversed(list(self.module.items())) if isinstance(value, DiskTensor)
        }
        first = {name: places[value.offset] for name, value in self.module.items() if isinstance(value, DiskTensor)}
        names = (
            "optimizer",
            "frozen_param_shapes",
            "frozen_param_fragments",
            "lr_scheduler",
            "data_sampler",
            "random_ltd",
        )
        return {
            **dict.fromkeys(names),
            "module": self._loaded["state_dict"],
            "buffer_names": [],
            "shared_params": {name: source for name, source in first.items() if name != source},
            "sparse_tensor_module_names": set(),
            "skipped_steps": 0,
            "global_steps": int(self.scalars(0).get("step", 0)),
            "dp_world_size": self.world_size,
            "mp_world_size": 1,
            "ds_config": self._config(),
            "ds_version": version("deepspeed"),
            "optim_wrapper": {key: value for key, value in settings.items() if value is not None},
            **client,
        }

    def _config(self) -> dict[str, Any]:
        dtype = self.module[self.parameters[0].name].dtype
        return {
            "zero_optimization": {"stage": 0},
            **{mode: {"enabled": dtype == name} for name, mode in _MODES.items()},
        }

    @property
    def outer(self) -> dict[str, Any]:
        return {"ds_version": version("deepspeed")}

    def shared_state(self, stage: int) -> dict[str, Any]:
        """ZeRO-1/2 keep what the engine began with where the file says nothing; ZeRO-3 must be told (`_rigid_load_state_dict`)."""
        if stage != 3:
            return {}
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

        scaler = self._loaded["optimizer"].get("loss_scaler") or {}
        scale = scaler.get("scale")
        made = (
            LossScaler(scale=1.0)
            if scale is None
            else DynamicLossScaler(
                init_scale=scale,
                scale_window=scaler.get("growth_interval", 1000),
                min_scale=1,
                delayed_shift=2,
                consecutive_hysteresis=False,
            )
        )
        return {"loss_scaler": made, "dynamic_loss_scale": scale is not None, "overflow": False}

    prefix: str = ""
    clip_grad: float | None = None
    """Not in the file: the engine's own holds."""
    sub_group_elements: int = 10**9
    """DeepSpeed's own limit, which XTuner's settings leave."""

    def frozen(self) -> "OrderedDict[str, torch.Tensor]":
        """An adapter's file has none, and in a full fine-tune all are trained."""
        return OrderedDict()


def _plain(value: Any) -> Any:
    """A scalar's value; one of a tensor is read."""
    return float(value.read()) if isinstance(value, DiskTensor) else value


def numbered(optimizer: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state with the numbers that parameters have in a model with parameters `names`. One without names stays as it is."""
    groups = optimizer.get("param_groups", [])
    if not all(NAMES in group for group in groups):
        return optimizer
    plain = [{key: value for key, value in group.items() if key != NAMES} for group in groups]
    if len(groups) > 1:  # A group for each parameter, frozen or not: the numbers are right if none is frozen.
        return {**optimizer, "param_groups": plain}
    number = {name: index for index, name in enumerate(names)}
    named = dict(zip(groups[0]["params"], groups[0][NAMES], strict=True))
    state = {number[named[old]]: value for old, value in optimizer["state"].items()}
    return {**optimizer, "state": state, "param_groups": [{**plain[0], "params": list(range(len(names)))}]}
