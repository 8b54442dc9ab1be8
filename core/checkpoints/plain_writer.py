"""Writes a plain checkpoint, as mmengine saves one without DeepSpeed, from the masters and moments of another checkpoint."""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

from core.checkpoints.plain_layout import NAMES
from core.checkpoints.tensors import DiskTensor
from core.checkpoints.torch_file import Room, TorchFile
from core.checkpoints.transfer import Move, Piece, Place
from core.checkpoints.zero_layout import MASTER, Source

_DEEPSPEEDS: Final = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments",
    "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples",
    "dp_world_size", "mp_world_size", "ds_config", "ds_version", "optim_wrapper", "checkpoint_parallel_dims",
})  # fmt: skip
"""What DeepSpeed's engine and mmengine's strategy put beside the client's own (`_common_checkpoint_state`)."""


class PlainWriter:
    """Lays out the one file. Its weights are the float32 masters.

    Only trained parameters are known here, so only they have numbers: for a full fine-tune that is all. In an adapter's run the
    model has frozen ones between them; `param_names` says which is which, and the trainer's hook finds their numbers
    (`core.xtuner.runtime.resumed`).
    """

    def __init__(self, source: Source, target: Path, rates: list[float] | None) -> None:
        self._source, self._target, self._rates = source, target, rates
        self._rooms: dict[tuple[str, str], Room] = {}
        self._copied: dict[DiskTensor, Room] = {}
        self.files: list[TorchFile] = []

    def lay_out(self, states: dict[str, Any]) -> None:
        client = {key: value for key, value in states.items() if key not in _DEEPSPEEDS}
        content = {**client, "state_dict": self._weights(), "optimizer": self._optimizer(states)}
        self.files.append(TorchFile(self._target, content))

    def moves(self) -> tuple[list[Move], list[Move]]:
        file = self.files[0]
        kept = [
            Move(
                self._source.pieces(parameter.name, key),
                [Place(file, self._rooms[parameter.name, key], 0, parameter.elements)],
                self._source.dtype(key),
            )
            for key in self._source.keys
            for parameter in self._source.parameters
        ]
        others = [
            Move([Piece(tensor, 0, tensor.numel)], [Place(file, room, 0, tensor.numel)], tensor.dtype)
            for tensor, room in self._copied.items()
        ]
        return kept, others

    def _weights(self) -> "OrderedDict[str, Any]":
        """In the model's order: the trained ones from their masters, buffers as they are, tied ones once."""
        trained = {p.name: self._room(p.name, MASTER, p.shape) for p in self._source.parameters}
        shared = self._source.model_states.get("shared_params") or {}
        weights: OrderedDict[str, Any] = OrderedDict()
        for name, value in self._source.module.items():
            if name in trained:
                weights[name] = trained[name]
            elif shared.get(name) in trained:
                weights[name] = trained[shared[name]]
            elif isinstance(value, DiskTensor) and value.numel and not self._is_frozen(name):
                weights[name] = self._copied.setdefault(value, Room(value.dtype, value.shape))
        return weights

    def _is_frozen(self, name: str) -> bool:
        """A base model saved beside its adapter; a plain checkpoint holds the adapter only."""
        buffers = self._source.model_states.get("buffer_names", [])
        return name not in buffers and any(".lora_" in parameter.name for parameter in self._source.parameters)

    def _optimizer(self, states: dict[str, Any]) -> dict[str, Any]:
        source = self._source
        number = {parameter.name: index for index, parameter in enumerate(source.parameters)}
        moments = [key for key in source.keys if key != MASTER]
        state = {  # Each its own copy of the step: torch counts in place.
            number[p.name]: {
                **copy.deepcopy(source.scalars(p.group)),
                **{key: self._room(p.name, key, p.shape) for key in moments},
            }
            for p in source.parameters
        }
        groups = []
        for index, group in enumerate(source.parameter_groups):
            names = [p.name for p in source.parameters if p.group == index]
            rate = self._rates[index] if self._rates else group.get("lr")
            groups.append({**group, "lr": rate, "params": [number[name] for name in names], NAMES: names})
        return {"state": state, "param_groups": groups, **states.get("optim_wrapper", {})}

    def _room(self, name: str, key: str, shape: tuple[int, ...]) -> Room:
        return self._rooms.setdefault((name, key), Room(self._source.dtype(key), shape))
