"""Moves tensors from the pieces they lie in to the rooms they shall lie in, block by block: read once, hashed, checked, written.

Knows files and bytes, no layout of DeepSpeed's and no torch. Memory is a block for each thread, whatever the tensors.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from core.checkpoints.tensors import NUMPY_TYPES, Array, DiskTensor, convert, read_into
from core.checkpoints.torch_file import Room, TorchFile

_BLOCK_BYTES: Final = 1 << 20
"""Fits a core's own cache: read, hashed, summed and written without going to memory in between."""
_THREADS: Final = min(8, (os.cpu_count() or 2) + 1)
"""One more than processors: one waits for the disk."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of a flat tensor on the disk."""

    tensor: DiskTensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where some elements go: `count` of them, from element `start` of a room on."""

    file: TorchFile
    room: Room
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor: its pieces in order, and the places that its elements fill one after the other."""

    pieces: Sequence[Piece]
    places: Sequence[Place]
    dtype: str
    """What its elements become before they are hashed and written; the type of its rooms."""

    @property
    def nbytes(self) -> int:
        return sum((p.stop - p.start) * NUMPY_TYPES[p.tensor.dtype].itemsize for p in self.pieces)


class Files:
    """Opened files, shared by all threads: each reads at its own offsets."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def open(self, pieces: Iterable[Piece]) -> None:
        """Open what the pieces lie in."""
        for piece in pieces:
            if piece.tensor.file not in self._handles:
                self._handles[piece.tensor.file] = os.open(piece.tensor.file, os.O_RDONLY)

    def handle(self, file: Path) -> int:
        return self._handles[file]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)


def move_all(moves: Sequence[Move], done: Callable[[int], None]) -> list[str]:
    """Fill every place; the hash of each tensor as its type makes it, in order. Without places a tensor is only hashed.

    `done(bytes)` is told of progress in this thread, and may raise to stop. The first error of any thread stops the others.
    """
    files = Files()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for move in moves:
            files.open(move.pieces)
        sizes = {pool.submit(_move, move, files): move.nbytes for move in moves}
        waiting: set[Future[str]] = set(sizes)
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            done(sum(sizes[future] for future in ended if future.result()))
        return [future.result() for future in sizes]
    finally:
        pool.shutdown(cancel_futures=True)
        files.close()


def _move(move: Move, files: Files) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    filler = _Filler(move.places, NUMPY_TYPES[move.dtype].itemsize)
    for block, dtype in _blocks(move.pieces, files):
        data = convert(block, dtype, move.dtype).view(np.uint8)
        digest.update(data.data)
        filler.fill(data.data)
    return digest.hexdigest()


class _Filler:
    """Fills places one after the other from blocks of any length. Without places, nothing."""

    def __init__(self, places: Sequence[Place], item_bytes: int) -> None:
        self._places = list(reversed(places))
        self._item_bytes = item_bytes
        self._filled_bytes = 0
        self._crc = 0

    def fill(self, data: memoryview) -> None:
        while self._places and data:
            place = self._places[-1]
            start, size = place.start * self._item_bytes, place.count * self._item_bytes
            now, data = data[: size - self._filled_bytes], data[size - self._filled_bytes :]
            place.file.write(place.room, start + self._filled_bytes, now)
            self._crc = zlib.crc32(now, self._crc)
            self._filled_bytes += len(now)
            if self._filled_bytes == size:
                place.file.filled(place.room, start, size, self._crc)
                self._places.pop()
                self._filled_bytes = self._crc = 0


def _blocks(pieces: Sequence[Piece], files: Files) -> Iterator[tuple[Array, str]]:
    """Elements of the pieces one after the other, each block with its type. A block is only good until the next one."""
    memory = np.empty(_BLOCK_BYTES, dtype=np.uint8)
    for piece in pieces:
        kind = NUMPY_TYPES[piece.tensor.dtype]
        begin, end = (piece.tensor.offset + bound * kind.itemsize for bound in (piece.start, piece.stop))
        for offset in range(begin, end, _BLOCK_BYTES):
            block = memory[: min(_BLOCK_BYTES, end - offset)].view(kind)
            read_into(files.handle(piece.tensor.file), block, offset, piece.tensor.file)
            yield block, piece.tensor.dtype
