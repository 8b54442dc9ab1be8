"""Checks a merged model tensor by tensor in bounded memory: what must be equal is equal, what was changed computes what it should.

For a changed tensor W'·x must equal W·x + s·B·(A·x) on a random x. The right side never forms B·A: another way to the same numbers
than the merge's. Each file is read once, from the disk where it is not cached, and hashed on the way.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.blocks import read_rows
from core.checkpoints.lora import Change, load_pair
from core.checkpoints.merge import MergePlan
from core.checkpoints.shards import Shard, read_folder
from core.checkpoints.tensors import Array, DiskTensor, widen, widen_into
from core.messages import message
from core.runs.job import Progress

LAYER_TOLERANCE: Final = {"F32": 1e-5, "F16": 8e-4, "BF16": 6e-3}
"""Relative L2 error of one product W'·x that rounding W' to the type may cause: half its unit roundoff in the mean; three times that."""
_BLOCK: Final = 1 << 21
"""Elements read at once."""
_SLICE: Final = 1 << 16
"""Elements whose float32 copy stays in the processor's cache."""
_FILES: Final = min(4, os.cpu_count() or 2)
"""Files checked side by side."""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a tensor of the result should be made of."""

    source: DiskTensor
    change: Change | None


def check_layers(plan: MergePlan, merged: Path, progress: Progress) -> dict[str, Any]:
    """Figures for danlu.json: method, tensors, changed_tensors, differing_tensors, layer_error, layer_tolerance, sha256 by file."""
    shards = read_folder(merged)
    expected = dict(_expectations(plan))
    total = sum(shard.size_bytes for shard in shards)
    checks = [_FileCheck(shard, expected) for shard in shards]
    with ThreadPoolExecutor(_FILES) as pool:
        waiting: set[Future[None]] = {pool.submit(check.run) for check in checks}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                done = sum(check.done_bytes for check in checks)
                progress.update(done, total, message("checkpoints.progress.verify_layers"), unit="bytes")
        except BaseException:
            for check in checks:
                check.is_stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    errors = [error for check in checks for error in check.errors]
    missing = expected.keys() - {name for shard in shards for name in shard.tensors}
    tolerance = LAYER_TOLERANCE.get(plan.dtype, LAYER_TOLERANCE["F32"])
    return {
        "method": "layers",
        "tensors": len(expected),
        "changed_tensors": len(plan.plan.changes),
        "differing_tensors": len(missing) + sum(error == float("inf") for error in errors),
        "layer_error": max((error for error in errors if error != float("inf")), default=0.0),
        "layer_tolerance": tolerance,
        "sha256": {check.shard.file.name: check.digest.hexdigest() for check in checks},
    }


def _expectations(plan: MergePlan) -> Iterator[tuple[str, _Expected]]:
    for shard, new in plan.shards:
        for name, source in [*shard.tensors.items(), *((n, shard.tensors[old]) for n, old in new.items())]:
            yield name, _Expected(source, plan.plan.changes.get(name))


class _FileCheck:
    """One file from its first byte to its last; the hash is computed beside the arithmetic."""

    def __init__(self, shard: Shard, expected: dict[str, _Expected]) -> None:
        self.shard, self._expected = shard, expected
        self.digest = hashlib.sha256(shard.header_bytes)
        """Of the file as it lies on the disk: the head, and the tensors, which follow each other without gaps."""
        self.errors: list[float] = []
        self.done_bytes = len(shard.header_bytes)
        self.is_stopped = False

    def run(self) -> None:
        with ThreadPoolExecutor(1) as self._hashing:
            for name, tensor in self.shard.tensors.items():
                self.errors.append(self._error(self._expected.get(name), tensor))
                if self.is_stopped:
                    return

    def _error(self, expected: _Expected | None, result: DiskTensor) -> float:
        """Relative error of one tensor; infinite if it is not what it should be at all. Reads all of `result`."""
        if expected is None or (result.shape, result.dtype) != (expected.source.shape, expected.source.dtype):
            for _ in self._read(result, result.numel, 1):
                pass
            return float("inf")
        change = expected.change
        if change is None:
            return 0.0 if self._is_same(expected.source, result) else float("inf")
        if len(result.shape) != 2 or any(pair.magnitude is not None for pair in change.pairs):
            return self._whole_error(expected.source, change, result)
        return self._product_error(change.replacement or expected.source, change, result)

    def _read(self, tensor: DiskTensor, rows: int, width: int) -> Iterator[tuple[int, Array]]:
        """As read_rows; what was read is being hashed until the next is asked for."""
        for row, bits in read_rows(tensor, rows, width, max(1, _BLOCK // width)):
            hashed = self._hashing.submit(self.digest.update, bits.view(np.uint8).data)
            yield row, bits
            hashed.result()
            self.done_bytes += bits.nbytes
            if self.is_stopped:
                return

    def _is_same(self, source: DiskTensor, result: DiskTensor) -> bool:
        found, expected = self._read(result, result.numel, 1), read_rows(source, source.numel, 1, _BLOCK)
        # To the end, whatever comes out: all of the result is to be hashed.
        differing = sum(not np.array_equal(one, other) for (_, one), (_, other) in zip(found, expected, strict=False))
        return differing == 0

    def _product_error(self, source: DiskTensor, change: Change, result: DiskTensor) -> float:
        """Relative L2 error of W'·x. A NaN anywhere makes it infinite."""
        rows, width = source.shape
        probe = np.random.default_rng(0).standard_normal(width).astype(np.float32)
        found, expected = np.empty(rows, dtype=np.float32), np.empty(rows, dtype=np.float32)
        left = read_rows(source, rows, width, max(1, _BLOCK // width))
        for (row, other), (_, one) in zip(self._read(result, rows, width), left, strict=False):
            end = row + other.size // width
            _times(one, source.dtype, probe, expected[row:end])
            _times(other, result.dtype, probe, found[row:end])
        for pair in change.pairs:
            loaded = load_pair(pair)
            expected += loaded.left @ (loaded.right @ probe)
        error, scale = np.linalg.norm(expected - found), np.linalg.norm(expected)
        ratio = float(error / scale) if scale else float(error)
        return ratio if np.isfinite(ratio) else float("inf")

    def _whole_error(self, source: DiskTensor, change: Change, result: DiskTensor) -> float:
        """For vectors and DoRA, which rescales whole rows (columns if transposed): the whole tensor in float64."""
        expected = _exact(source, change).reshape(-1)
        found = np.concatenate([bits.copy() for _, bits in self._read(result, result.numel, 1)])
        distance = np.linalg.norm(expected[: found.size] - widen(found, result.dtype))
        ratio = float(distance / (np.linalg.norm(expected) or 1.0))
        return ratio if np.isfinite(ratio) else float("inf")


def _times(bits: Array, dtype: str, probe: NDArray[np.float32], product: NDArray[np.float32]) -> None:
    """`product` = rows of a matrix, given as `bits` of type `dtype`, times `probe`."""
    width = probe.size
    step = max(1, _SLICE // width)
    values = np.empty(step * width, dtype=np.float32)
    for row in range(0, product.size, step):
        raw = bits[row * width : (row + step) * width]
        widen_into(values[: raw.size], raw, dtype)
        np.matmul(values[: raw.size].reshape(-1, width), probe, out=product[row : row + step])


def _exact(source: DiskTensor, change: Change) -> NDArray[np.float64]:
    start = change.replacement or source
    expected = widen(start.read(), start.dtype).astype(np.float64)
    for pair in change.pairs:
        loaded = load_pair(pair)
        expected = expected + loaded.left.astype(np.float64) @ loaded.right.astype(np.float64)
    for pair in change.pairs:
        if pair.magnitude is not None:
            magnitude = widen(pair.magnitude.read(), pair.magnitude.dtype).astype(np.float64)
            axis = 0 if pair.is_transposed else 1
            factor = magnitude / np.linalg.norm(expected, axis=axis)
            expected = expected * (factor if pair.is_transposed else factor[:, None])
    for tensor, factor in change.additions:
        expected = expected + widen(tensor.read(), tensor.dtype).astype(np.float64) * factor
    return expected
