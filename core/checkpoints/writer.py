"""Fills the files of a merged model from a few threads by offset, so that reading, arithmetic and writing overlap. Knows no LoRA.

A file has a hidden name until it is whole and on the disk: one with its final name need not be written again.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from core.checkpoints.blocks import NotFiniteError, changed_blocks
from core.checkpoints.direct import WINDOW_BYTES, DirectReader, DirectWriter
from core.checkpoints.lora import Change
from core.checkpoints.tensors import NUMPY_TYPES, Array, DiskTensor, is_finite
from core.errors import InputError
from core.messages import message
from core.runs.job import Progress

_THREADS: Final = min(8, (os.cpu_count() or 2) + 2)
"""More than processors: some wait for the disk, which reads and writes at once."""


Arithmetic = Callable[[DiskTensor, Change], Iterator[tuple[int, Array]]]
"""What `blocks.changed_blocks` is."""


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

    def __init__(self, total: int, progress: Progress, arithmetic: Arithmetic = changed_blocks) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self._arithmetic, self._is_stopped = arithmetic, False
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
        output = DirectWriter(unfinished, plan.size_bytes)
        try:
            output.write(np.frombuffer(plan.header, dtype=np.uint8), 0)
            self._write_all(plan.outputs, output)
        except BaseException:
            output.close()
            raise
        self._synced.append(self._syncing.submit(_finish, output, unfinished, plan.file))

    def _write_all(self, outputs: Sequence[Output], target: DirectWriter) -> None:
        waiting: set[Future[int]] = {self._workers.submit(self._write_one, output, target) for output in outputs}
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

    def _write_one(self, output: Output, target: DirectWriter) -> int:
        if output.change is None:
            self._copy(output, target)
            return output.source.nbytes
        item = NUMPY_TYPES[output.source.dtype].itemsize
        try:
            with np.errstate(all="ignore"):
                for element, bits in self._arithmetic(output.source, output.change):
                    if self._is_stopped:
                        return 0
                    target.write(bits.reshape(-1).view(np.uint8), output.offset + element * item)
        except NotFiniteError as error:
            raise _explain_not_finite(output) from error
        return output.source.nbytes

    def _copy(self, output: Output, target: DirectWriter) -> None:
        if not output.source.is_contiguous:
            target.write(output.source.read().reshape(-1).view(np.uint8), output.offset)
            return
        done, size = 0, output.source.nbytes
        with DirectReader(output.source.file) as reader:
            while done < size and not self._is_stopped:
                values = reader.read(output.source.offset + done, min(WINDOW_BYTES, size - done))
                target.write(values, output.offset + done)
                done += values.size


def _finish(output: DirectWriter, unfinished: Path, final: Path) -> None:
    output.finish()
    unfinished.rename(final)


def _explain_not_finite(output: Output) -> InputError:
    source = output.source.read()
    code = "checkpoints.overflow" if is_finite(source, output.source.dtype) else "checkpoints.not_finite"
    return InputError(code, path=str(output.source.file), name=output.name, dtype=output.source.dtype)
