"""Frozen weights of linear layers: stacked, in the dtype of the arithmetic, or 4-bit and unpacked in each use (or once)."""

from collections.abc import Sequence
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def is_4bit(module: nn.Module) -> bool:
    """Whether bitsandbytes holds this layer's weight in 4 bits."""
    return hasattr(getattr(module, "weight", None), "quant_state")


class FrozenWeight:
    """The weights of `modules` (which read one input) as one matrix. They are never trained."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.packed = is_4bit(self.modules[0])
        self.rows = [_shape(module)[0] for module in self.modules]
        self.columns = _shape(self.modules[0])[1]
        starts = [sum(self.rows[:index]) for index in range(len(self.rows) + 1)]
        self.spans = list(pairwise(starts))
        self._dense: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def elements(self) -> int:
        return sum(self.rows) * self.columns

    @torch.no_grad()
    def settle(self, dtype: torch.dtype, *, shared: bool = False) -> None:
        """Put plain weights into `dtype`, stacked. The layers' own weights become views of it, so nothing is held twice.

        This is the cast that autocast would make in each call, made once. `shared`: the weight belongs to another module
        too (a tied embedding): leave that as it is and keep a copy. 4-bit weights stay as they are.
        """
        if self.packed or self._dense is not None:
            return
        if shared or (len(self.modules) == 1 and self._weight(0).dtype == dtype):
            self._dense = self._weight(0).detach().to(dtype)
            return
        dense = torch.empty(sum(self.rows), self.columns, dtype=dtype, device=self._weight(0).device)
        for module, (start, stop) in zip(self.modules, self.spans, strict=True):
            weight = module.get_parameter("weight")
            dense[start:stop].copy_(weight)
            if weight.dtype != dtype:
                # Generation runs the layer without autocast: let it take what the norms give, as it did before.
                module.forward = MethodType(_cast_forward, module)
            weight.data = dense[start:stop]
        self._dense = dense

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> None:
        """Keep the 4-bit weights unpacked in `dtype` from now on: 2 bytes a weight against an unpacking in each use."""
        self._dense = self.dense(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(out of all projections, in), detached. Unpacks 4-bit weights into new memory unless they are kept unpacked."""
        if self._dense is not None:
            return self._dense if self._dense.dtype == dtype else self._dense.to(dtype)
        if not self.packed:
            return torch.cat([self._weight(index).detach() for index in range(len(self.modules))]).to(dtype)
        return _unpacked(self.modules, self.spans, self.columns, dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(out of all projections), or None if no projection has one."""
        if all(getattr(module, "bias", None) is None for module in self.modules):
            return None
        if self._bias is None or self._bias.dtype != dtype:
            device = self._weight(0).device
            parts = [
                torch.zeros(rows, dtype=dtype, device=device) if module.bias is None else module.bias.detach().to(dtype)
                for module, rows in zip(self.modules, self.rows, strict=True)
            ]
            self._bias = torch.cat(parts)
        return self._bias

    def _weight(self, index: int) -> Tensor:
        return self.modules[index].get_parameter("weight")


def _cast_forward(module: nn.Linear, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(module.weight.dtype)
    return functional.linear(x.to(module.weight.dtype), module.weight, bias).to(x.dtype)


def _shape(module: nn.Module) -> tuple[int, int]:
    if is_4bit(module):
        shape: Any = module.get_parameter("weight").quant_state.shape
        return int(shape[0]), int(shape[1])
    weight = module.get_parameter("weight")
    return int(weight.shape[0]), int(weight.shape[1])


def _unpacked(
    modules: Sequence[nn.Module], spans: Sequence[tuple[int, int]], columns: int, dtype: torch.dtype
) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weights: list[Any] = [module.get_parameter("weight") for module in modules]
    if len(weights) == 1:
        only: Tensor = dequantize_4bit(weights[0].data, weights[0].quant_state)
        return only.to(dtype)
    dense = torch.empty(spans[-1][1], columns, dtype=dtype, device=weights[0].device)
    for weight, (start, stop) in zip(weights, spans, strict=True):
        # Not with `out`: bitsandbytes 0.49.2 compares its shape with a list and refuses every tensor.
        dense[start:stop].copy_(dequantize_4bit(weight.data, weight.quant_state))
    return dense
