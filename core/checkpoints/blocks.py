"""The values of a changed tensor, computed block of rows by block of rows: float32 inside, rounded once.

Memory is two blocks, whatever the tensor. A block's product B·A is formed at once (a matrix product likes many rows); all else runs
over slices that stay in the processor's cache.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.direct import Bytes, DirectReader
from core.checkpoints.lora import Change, LoadedPair, load_pair
from core.checkpoints.tensors import NUMPY_TYPES, Array, DiskTensor, is_finite, narrow, widen, widen_into

BLOCK_ELEMENTS: Final = 1 << 21
_SLICE_ELEMENTS: Final = 1 << (16 if (os.cpu_count() or 2) < 8 else 18)
"""Few processors: what stays nearest to them is fastest. Many: threads wait for each other at every slice, and larger ones make fewer
(in memory 2.2 instead of 1.6 GB/s on 32 cores, 0.7 instead of 0.8 on two)."""
Floats = NDArray[np.float32]


class NotFiniteError(Exception):
    """A result is NaN or infinite; the caller knows which tensor it is."""


def changed_blocks(source: DiskTensor, change: Change) -> Iterator[tuple[int, Array]]:
    """(first element, bits) of the tensor that `change` makes of `source`, in the type of `source`.

    The bits are only good until the next block. Raises NotFiniteError.
    """
    start = change.replacement or source
    pairs = [load_pair(pair) for pair in change.pairs]
    magnitude = next((_floats(pair.magnitude) for pair in change.pairs if pair.magnitude is not None), None)
    rows, width = matrix_shape(source)
    if magnitude is not None and change.pairs[0].is_transposed:
        yield 0, _checked(_dora_by_column(_floats(start).reshape(rows, width), pairs, magnitude), source.dtype)
        return
    additions = [_floats(tensor).reshape(-1) * np.float32(factor) for tensor, factor in change.additions]
    step = rows if len(source.shape) < 2 else max(1, BLOCK_ELEMENTS // width)
    buffers = _Buffers(min(rows, step) * width, source.dtype)
    for row, raw in read_rows(start, rows, width, step):
        end = min(rows, row + step)
        delta = buffers.product(pairs, row, end, width)
        if magnitude is not None:
            values = widen(raw, start.dtype).reshape(end - row, width) + delta.reshape(end - row, width)
            values *= (magnitude[row:end] / np.linalg.norm(values, axis=1))[:, None]
            yield row * width, _checked(values, source.dtype)
        else:
            parts = [addition[row * width : end * width] for addition in additions]
            yield row * width, buffers.add(raw, start.dtype, [delta, *parts] if pairs else parts)


class _Buffers:
    """Memory that every block of one tensor uses again: if taken anew, the kernel would have to clear it each time."""

    def __init__(self, elements: int, dtype: str) -> None:
        self._dtype = dtype
        self._delta = np.empty(elements, dtype=np.float32)
        self._more = np.empty(0, dtype=np.float32)
        self._bits = np.empty(elements, dtype=NUMPY_TYPES[dtype])
        self._slice = np.empty(min(elements, _SLICE_ELEMENTS), dtype=np.float32)
        self._odd = np.empty(self._slice.size, dtype=np.uint32)

    def product(self, pairs: Sequence[LoadedPair], row: int, end: int, width: int) -> Floats:
        """Sum of all pairs' B·A in rows `row` to `end`, flat."""
        delta = self._delta[: (end - row) * width].reshape(end - row, width)
        for number, pair in enumerate(pairs):
            if number == 0:
                np.matmul(pair.left[row:end], pair.right, out=delta)
            else:
                self._more = self._more if self._more.size == self._delta.size else np.empty_like(self._delta)
                more = self._more[: delta.size].reshape(delta.shape)
                np.matmul(pair.left[row:end], pair.right, out=more)
                np.add(delta, more, out=delta)
        return delta.reshape(-1)

    def add(self, raw: Array, dtype: str, parts: Sequence[Floats]) -> Array:
        """`raw`, the bits of type `dtype`, plus all `parts`, rounded to the result's type."""
        bits = self._bits[: raw.size]
        for first in range(0, raw.size, self._slice.size):
            last = min(raw.size, first + self._slice.size)
            values = self._slice[: last - first]
            widen_into(values, raw[first:last], dtype)
            for part in parts:
                np.add(values, part[first:last], out=values)
            self._round(values, bits[first:last])
        return bits

    def _round(self, values: Floats, bits: Array) -> None:
        """`values` to the type of `bits`, nearest and ties to even; `values` is used up."""
        # A sum of squares is finite only if every term is: one quick pass. float16 has a smaller range, so its bits are looked at too.
        if not np.isfinite(np.dot(values, values)) or self._dtype == "F16":
            bits[:] = _checked(values, self._dtype)
        elif self._dtype == "BF16":
            whole, odd = values.view(np.uint32), self._odd[: values.size]
            np.right_shift(whole, 16, out=odd)
            np.bitwise_and(odd, 1, out=odd)
            np.add(odd, 0x7FFF, out=odd)
            np.add(whole, odd, out=whole)
            np.right_shift(whole, 16, out=whole)
            np.copyto(bits, whole, casting="unsafe")
        else:
            np.copyto(bits, values)


def read_rows(
    tensor: DiskTensor, rows: int, width: int, step: int, memory: Bytes | None = None
) -> Iterator[tuple[int, Array]]:
    """(first row, bits of at most `step` rows), these only good until the next. `memory`: see DirectReader."""
    kind = NUMPY_TYPES[tensor.dtype]
    with DirectReader(tensor.file, memory) as reader:
        for row in range(0, rows, step):
            end = min(rows, row + step)
            if not tensor.is_contiguous:
                yield row, tensor.read_flat(row * width, end * width)
                continue
            start = tensor.offset + row * width * kind.itemsize
            values = reader.read(start, (end - row) * width * kind.itemsize)
            yield row, values.view(kind) if start % kind.itemsize == 0 else np.frombuffer(bytearray(values), kind)


def _checked(values: Floats, dtype: str) -> Array:
    bits = narrow(values.reshape(-1), dtype)
    if not is_finite(bits, dtype):
        raise NotFiniteError
    return bits


def _dora_by_column(weight: Floats, pairs: Sequence[LoadedPair], magnitude: Floats) -> Floats:
    """DoRA on a tensor that is in × out: outputs are columns, so their norms need the whole tensor."""
    whole = weight + sum((pair.left @ pair.right for pair in pairs), np.zeros((), dtype=np.float32))
    return np.asarray(whole * (magnitude / np.linalg.norm(whole, axis=0)), dtype=np.float32)


def matrix_shape(tensor: DiskTensor) -> tuple[int, int]:
    """Rows and width; a vector is a column, a number one row."""
    rows = tensor.shape[0] if tensor.shape else 1
    width = 1
    for size in tensor.shape[1:]:
        width *= size
    return rows, width


def _floats(tensor: DiskTensor) -> Any:
    return widen(tensor.read(), tensor.dtype)
