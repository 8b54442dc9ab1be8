"""Numbers that leave the device while it goes on: whoever needs them waits for the work before them, never for the work after."""

from typing import Any

import torch
from torch import Tensor


class Reading:
    """A tensor on its way to the host, begun now. It holds what the tensor holds at this point of the device's work."""

    def __init__(self, tensor: Tensor) -> None:
        is_on_gpu = tensor.device.type == "cuda"
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=is_on_gpu, requires_grad=False)
        self._host.copy_(tensor.detach(), non_blocking=is_on_gpu)
        self._arrived = torch.cuda.Event() if is_on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def __len__(self) -> int:
        return len(self._host)

    def value(self) -> Tensor:
        """On the CPU, as soon as it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


class LateNorm:
    """Gives mmengine the gradient's norm after the optimizer's step has been sent to the device.

    mmengine reads it between clipping and the step, and the device has nothing to do until the host comes back.
    """

    def __init__(self, wrapper: Any) -> None:
        """wrapper: mmengine's OptimWrapper, whose clipping is replaced by the same one without the wait."""
        self._wrapper = wrapper
        self._reading: Reading | None = None
        wrapper._clip_grad = self._clip

    def _clip(self) -> None:
        groups = self._wrapper.optimizer.param_groups
        trained = [weight for group in groups for weight in group["params"] if weight.grad is not None]
        norm = self._wrapper.clip_func(trained, **self._wrapper.clip_grad_kwargs) if trained else None
        self._reading = None if norm is None else Reading(norm)  # clipping by value knows no norm

    def settle(self) -> None:
        """Put the norm where mmengine's log and our own look for it."""
        if self._reading is not None:
            self._wrapper.message_hub.update_scalar(f"train/{self._wrapper.grad_name}", float(self._reading.value()))
            self._reading = None
