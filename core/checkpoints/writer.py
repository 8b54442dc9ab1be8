"""Fills the files of a merged model from a few threads by offset, so that reading, arithmetic and writing overlap. Knows no LoRA.

A file has a hidden name until it is whole and on the disk: one with its final name need not be written again.
"""

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from core.checkpoints.blocks import NotFiniteError, changed_blocks
from core.checkpoints.lora import Change
from core.checkpoints.tensors import NUMPY_TYPES, DiskTensor, is_finite
from core.errors import InputError
from core.messages import message
from core.runs.job import Progress

_COPY_BYTES: Final = 1 << 24
_THREADS: Final = min(8, (os.cpu_count() or 2) + 1)
"""One more than processors: one waits for the disk."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the result: where its values come from, where in its file they go, what happens between."""

    name: str
    source: DiskTensor
    offset: int
    change: Change | None


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file of the result."""

    file: Path
    header: bytes
    outputs: list[Output]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(output.source.nbytes for output in self.outputs)


class Writer:
    """Writes files one after the other; while the disk takes one in, the next is computed. Close it to wait for the last."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self._is_stopped = False
        self._workers = ThreadPoolExecutor(_THREADS)
        self._syncing = ThreadPoolExecutor(1)
        self._synced: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopped = error is not None
        self._workers.shutdown(cancel_futures=True)
        self._syncing.shutdown()
        if error is None:
            for future in self._synced:
                future.result()

    def write(self, plan: FilePlan) -> None:
        """Raises the first error of any thread, after the others have ended."""
        if plan.file.exists() and plan.file.stat().st_size == plan.size_bytes:
            self._count(plan.size_bytes)
            return
        unfinished = plan.file.with_name(f".{plan.file.name}.writing")
        handle = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(handle, 0, plan.size_bytes)
            write_at(handle, memoryview(plan.header), 0)
            self._write_all(plan.outputs, handle)
        except BaseException:
            os.close(handle)
            raise
        self._synced.append(self._syncing.submit(_finish, handle, unfinished, plan.file))

    def _write_all(self, outputs: Sequence[Output], handle: int) -> None:
        waiting: set[Future[int]] = {self._workers.submit(self._write_one, output, handle) for output in outputs}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                self._count(sum(future.result() for future in ended))
        except BaseException:
            self._is_stopped = True
            for future in waiting:
                future.cancel()
            wait(waiting)
            raise

    def _count(self, size_bytes: int) -> None:
        self._done += size_bytes
        self._progress.update(self._done, self._total, message("checkpoints.progress.merge"), unit="bytes")

    def _write_one(self, output: Output, handle: int) -> int:
        if output.change is None:
            self._copy(output, handle)
            return output.source.nbytes
        item = NUMPY_TYPES[output.source.dtype].itemsize
        try:
            with np.errstate(all="ignore"):
                for element, bits in changed_blocks(output.source, output.change):
                    if self._is_stopped:
                        return 0
                    write_at(handle, bits.view(np.uint8).data, output.offset + element * item)
        except NotFiniteError as error:
            raise _explain_not_finite(output) from error
        return output.source.nbytes

    def _copy(self, output: Output, handle: int) -> None:
        with open(output.source.file, "rb", buffering=0) as stream:
            done, size = 0, output.source.nbytes
            while done < size and not self._is_stopped:
                start, end = output.source.offset + done, output.offset + done
                got = copy_range(stream.fileno(), handle, min(_COPY_BYTES, size - done), start, end)
                if got == 0:
                    found = output.source.file.stat().st_size
                    raise InputError("checkpoints.truncated", path=str(output.source.file), size=found)
                done += got


def write_at(handle: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def copy_range(source: int, target: int, count: int, start: int, end: int) -> int:
    """Copy inside the kernel where the file system can, else through memory."""
    try:
        return os.copy_file_range(source, target, count, start, end)
    except OSError:
        data = os.pread(source, count, start)
        write_at(target, memoryview(data), end)
        return len(data)


def _finish(handle: int, unfinished: Path, final: Path) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    unfinished.rename(final)


def _explain_not_finite(output: Output) -> InputError:
    source = output.source.read()
    code = "checkpoints.overflow" if is_finite(source, output.source.dtype) else "checkpoints.not_finite"
    return InputError(code, path=str(output.source.file), name=output.name, dtype=output.source.dtype)
