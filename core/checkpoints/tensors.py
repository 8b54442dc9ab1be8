"""Tensors that stay on disk: where one lies in a file, and how to read it or a part of it. No torch: numpy only.

numpy has no bfloat16, so a BF16 tensor is read as uint16 (its bits); `widen` and `narrow` go to float32 and back.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError

Array = NDArray[Any]

NUMPY_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
"""Name of a type in safetensors → the numpy type that holds its bits."""
FLOATS: Final = ("F32", "F16", "BF16")
"""Types that weights are computed from and written in."""
DTYPE_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """One tensor in a file. Nothing is read until `read` is called."""

    file: Path
    dtype: str
    """Name of the type as safetensors writes it: F32, BF16, …"""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file to the tensor's first element."""
    stride: tuple[int, ...] | None = None
    """In elements; None: row after row without gaps."""

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * NUMPY_TYPES[self.dtype].itemsize

    @property
    def is_contiguous(self) -> bool:
        return self.stride is None or self.stride == _row_major(self.shape) or self.numel == 0

    def read(self) -> Array:
        """The whole tensor, in the type that holds its bits. Raises InputError if the file is shorter than it should be."""
        if self.is_contiguous:
            return self.read_flat(0, self.numel).reshape(self.shape)
        assert self.stride is not None
        reach = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = _read_at(self.file, self.offset, reach, NUMPY_TYPES[self.dtype])
        steps = [step * flat.itemsize for step in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, steps))

    def read_flat(self, start: int, stop: int) -> Array:
        """Elements `start` to `stop` of the flattened tensor; reads only these bytes."""
        if not self.is_contiguous:
            return self.read().reshape(-1)[start:stop]
        kind = NUMPY_TYPES[self.dtype]
        return _read_at(self.file, self.offset + start * kind.itemsize, stop - start, kind)


def widen(values: Array, dtype: str) -> NDArray[np.float32]:
    """`values`, the bits of type `dtype`, as float32 (exact for F16 and BF16)."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def widen_into(values: NDArray[np.float32], raw: Array, dtype: str) -> None:
    """As `widen`, into memory that is there."""
    if dtype == "BF16":
        whole = values.view(np.uint32)
        np.copyto(whole, raw)
        np.left_shift(whole, 16, out=whole)
    else:
        np.copyto(values, raw, casting="same_kind")


def narrow(values: NDArray[np.float32], dtype: str) -> Array:
    """float32 rounded once to `dtype` (nearest, ties to even), as the numpy type that holds its bits."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(NUMPY_TYPES[dtype], copy=False)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).reshape(values.shape)
    is_nan = np.isnan(values)
    if is_nan.any():
        rounded[is_nan] = 0x7FC0
    return rounded


def convert(values: Array, source: str, target: str) -> Array:
    """The bits of type `source` as bits of type `target`. Integers and equal types come back as they are."""
    if source == target or source not in (*FLOATS, "F64") or target not in FLOATS:
        return values
    return narrow(widen(values, source), target)


def is_finite(values: Array, dtype: str) -> bool:
    """Whether no element is NaN or infinite. `values`: the bits of type `dtype`."""
    if dtype == "BF16":
        return not bool(((values & 0x7F80) == 0x7F80).any())
    return dtype not in ("F16", "F32", "F64") or bool(np.isfinite(values).all())


def read_into(handle: int, values: Array, offset: int, file: Path) -> None:
    """Fill `values` from `offset` on of the open `file`. Raises InputError `checkpoints.truncated`."""
    view = values.view(np.uint8).data if values.size else memoryview(b"")
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done : done + 2**30]], offset + done)
        if got == 0:
            raise InputError("checkpoints.truncated", path=str(file), size=file.stat().st_size)
        done += got


def _read_at(file: Path, offset: int, count: int, kind: np.dtype[Any]) -> Array:
    values: Array = np.empty(count, dtype=kind)
    with open(file, "rb", buffering=0) as stream:
        read_into(stream.fileno(), values, offset, file)
    return values


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps: list[int] = []
    step = 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))
