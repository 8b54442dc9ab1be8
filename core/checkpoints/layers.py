"""Checks a merged model tensor by tensor in bounded memory: what must be equal is equal, what was changed computes what it should.

For a changed tensor W'·x must equal W·x + s·B·(A·x) on a random x. The right side never forms B·A: another way to the same numbers
than the merge's. Each file is hashed on the way.
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
from core.checkpoints.shards import read_folder
from core.checkpoints.tensors import NUMPY_TYPES, DiskTensor, widen, widen_into
from core.messages import message
from core.runs.job import Progress

LAYER_TOLERANCE: Final = {"F32": 1e-5, "F16": 8e-4, "BF16": 6e-3}
"""Relative L2 error of one product W'·x that rounding W' to the type may cause: half its unit roundoff in the mean; three times that."""
_BLOCK: Final = 1 << 18
"""Elements; a block and its float32 copy stay in the processor's cache."""
_THREADS: Final = min(8, (os.cpu_count() or 2) + 1)
"""One more than processors: one waits for the disk."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One tensor to look at; `result` None: it is missing."""

    name: str
    source: DiskTensor
    change: Change | None
    result: DiskTensor | None


def check_layers(plan: MergePlan, merged: Path, progress: Progress) -> dict[str, Any]:
    """Figures for danlu.json: method, tensors, changed_tensors, differing_tensors, layer_error, layer_tolerance, sha256 by file."""
    result = {name: tensor for shard in read_folder(merged) for name, tensor in shard.tensors.items()}
    tasks = list(_tasks(plan, result))
    files = sorted({tensor.file for tensor in result.values()})
    total = plan.size_bytes + sum(file.stat().st_size for file in files)
    surplus = len(result.keys() - {task.name for task in tasks})
    tolerance = LAYER_TOLERANCE.get(plan.dtype, LAYER_TOLERANCE["F32"])
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = {pool.submit(_hash, file, progress): file for file in files}
        errors = {pool.submit(_error, task): task.source.nbytes for task in tasks}
        try:
            _follow({**{future: file.stat().st_size for future, file in hashes.items()}, **errors}, total, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = [future.result() for future in errors]
    return {
        "method": "layers",
        "tensors": len(tasks),
        "changed_tensors": len(plan.plan.changes),
        "differing_tensors": surplus + sum(error == float("inf") for error in found),
        "layer_error": max((error for error in found if error != float("inf")), default=0.0),
        "layer_tolerance": tolerance,
        "sha256": {file.name: future.result() for future, file in hashes.items()},
    }


def _tasks(plan: MergePlan, result: dict[str, DiskTensor]) -> Iterator[_Task]:
    for shard, new in plan.shards:
        for name, source in [*shard.tensors.items(), *((n, shard.tensors[old]) for n, old in new.items())]:
            yield _Task(name, source, plan.plan.changes.get(name), result.get(name))


def _follow(sizes: dict[Future[Any], int], total: int, progress: Progress) -> None:
    done, waiting = 0, set(sizes)
    while waiting:
        ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in ended:
            future.result()
        done += sum(sizes[future] for future in ended)
        progress.update(done, total, message("checkpoints.progress.verify_layers"), unit="bytes")


def _hash(file: Path, progress: Progress) -> str:
    """sha256 of the file as it lies on the disk."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 22))
    with open(file, "rb", buffering=0) as stream:
        while got := stream.readinto(buffer):
            digest.update(buffer[:got])
            progress.check()
    return digest.hexdigest()


def _error(task: _Task) -> float:
    """Relative error of one tensor; infinite if it is not what it should be at all."""
    if task.result is None or (task.result.shape, task.result.dtype) != (task.source.shape, task.source.dtype):
        return float("inf")
    if task.change is None:
        return 0.0 if _is_same(task.source, task.result) else float("inf")
    if len(task.source.shape) != 2 or any(pair.magnitude is not None for pair in task.change.pairs):
        return _whole_error(task.source, task.change, task.result)
    return _product_error(task.source, task.change, task.result)


def _is_same(left: DiskTensor, right: DiskTensor) -> bool:
    return all(
        np.array_equal(
            left.read_flat(start, min(start + _BLOCK, left.numel)),
            right.read_flat(start, min(start + _BLOCK, left.numel)),
        )
        for start in range(0, left.numel, _BLOCK)
    )


def _product_error(source: DiskTensor, change: Change, result: DiskTensor) -> float:
    """Relative L2 error of W'·x. A NaN anywhere makes it infinite."""
    probe = np.random.default_rng(0).standard_normal(source.shape[1]).astype(np.float32)
    expected = _times(change.replacement or source, probe)
    for pair in change.pairs:
        loaded = load_pair(pair)
        expected += loaded.left @ (loaded.right @ probe)
    error, scale = np.linalg.norm(expected - _times(result, probe)), np.linalg.norm(expected)
    ratio = float(error / scale) if scale else float(error)
    return ratio if np.isfinite(ratio) else float("inf")


def _times(tensor: DiskTensor, probe: NDArray[np.float32]) -> NDArray[np.float32]:
    """W·x, a few rows at a time, always in the same memory."""
    rows, width = tensor.shape
    step = max(1, _BLOCK // width)
    raw = np.empty(step * width, dtype=NUMPY_TYPES[tensor.dtype])
    values = np.empty(step * width, dtype=np.float32)
    product = np.empty(rows, dtype=np.float32)
    for row, bits in read_rows(tensor, rows, width, raw):
        end = row + bits.size // width
        widen_into(values[: bits.size], bits, tensor.dtype)
        np.matmul(values[: bits.size].reshape(-1, width), probe, out=product[row:end])
    return product


def _whole_error(source: DiskTensor, change: Change, result: DiskTensor) -> float:
    """For vectors and DoRA, which rescales whole rows (columns if transposed): the whole tensor in float64."""
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
    ratio = float(np.linalg.norm(expected - widen(result.read(), result.dtype)) / (np.linalg.norm(expected) or 1.0))
    return ratio if np.isfinite(ratio) else float("inf")
