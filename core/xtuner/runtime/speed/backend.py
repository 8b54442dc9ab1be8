"""Says where the Triton kernels can run. Everything else here has a torch form for the places where they cannot."""

import functools
import importlib.util
import os

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed and there is something it can compile for (a GPU, or its own interpreter in tests)."""
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def uses_kernels(tensor: Tensor) -> bool:
    """Whether this tensor is where the Triton kernels run."""
    return has_triton() and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
