"""Large files read and written past the page cache (O_DIRECT, Linux), so that the processor is left for arithmetic. Knows bytes only.

Through the page cache every byte is copied once more, into memory that the kernel must first find and clear. What lies in the cache
already is read from there. A file system without direct access gets the ordinary one.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError

Bytes = NDArray[np.uint8]

ALIGNMENT_BYTES: Final = 4096
"""Offsets, sizes and addresses of direct access are multiples of it: no disk in use has larger logical blocks."""
WINDOW_BYTES: Final = 1 << 22
_LIBC: Final = ctypes.CDLL(None)


class DirectReader:
    """An open file. What `read` gives is only good until the next `read`.

    `memory`: to read into where it is large enough: `size` and three times the alignment.
    """

    def __init__(self, file: Path, memory: Bytes | None = None) -> None:
        self._file = file
        self._memory = _aligned(0) if memory is None else _align(memory)
        self._handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._cache = _PageCache(self._handle)
        try:
            self._direct: int | None = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            self._direct = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.close()
        os.close(self._handle)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, offset: int, size: int) -> Bytes:
        """`size` bytes from `offset` on. Raises InputError `checkpoints.truncated`."""
        first = offset - offset % ALIGNMENT_BYTES
        span = _rounded_up(offset + size) - first
        if self._memory.size < span:
            self._memory = _aligned(span)
        values = self._memory[offset - first :][:size]
        if self._direct is None or self._cache.holds(first, span) or not self._fetch(first, span, offset + size):
            self._read_all(values, offset)
        return values

    def _fetch(self, first: int, span: int, end: int) -> bool:
        """Read `span` aligned bytes from the disk; whether all up to `end` came. False also where the disk wants larger blocks."""
        assert self._direct is not None
        try:
            return first + os.preadv(self._direct, [self._memory[:span].data], first) >= end
        except OSError:
            return False

    def _read_all(self, values: Bytes, offset: int) -> None:
        done = 0
        while done < values.size:
            got = os.preadv(self._handle, [values[done : done + WINDOW_BYTES].data], offset + done)
            if got == 0:
                raise InputError("checkpoints.truncated", path=str(self._file), size=self._file.stat().st_size)
            done += got


class _PageCache:
    """What of an open file lies in memory. Asking fetches nothing, unlike a read that does not wait (RWF_NOWAIT, Linux 6)."""

    def __init__(self, handle: int) -> None:
        size = os.fstat(handle).st_size
        self._map = mmap.mmap(handle, size, prot=mmap.PROT_READ) if size else None
        self._pages = np.frombuffer(self._map, dtype=np.uint8) if self._map is not None else _aligned(0)

    def holds(self, first: int, span: int) -> bool:
        """Whether all pages from `first` on are there; `first` is aligned, what lies behind the end counts as there."""
        span = min(span, self._pages.size - first)
        if span <= 0:
            return True
        resident = np.zeros(-(-span // mmap.PAGESIZE), dtype=np.uint8)
        address, answer = ctypes.c_void_p(self._pages.ctypes.data + first), ctypes.c_void_p(resident.ctypes.data)
        failed = _LIBC.mincore(address, ctypes.c_size_t(span), answer)
        return not failed and bool((resident & 1).all())

    def close(self) -> None:
        del self._pages
        if self._map is not None:
            self._map.close()


@dataclass(slots=True)
class _Window:
    """A part of the file that is being filled."""

    memory: Bytes
    missing: int
    """Bytes that have not come."""


class DirectWriter:
    """A new file of a known size that several threads fill, each byte once, in any order; full windows go to the disk at once.

    Threads that go through the file side by side keep few windows open; writing here and there would keep many.
    """

    def __init__(self, file: Path, size: int) -> None:
        self._size = size
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._open: dict[int, _Window] = {}
        self._free: list[Bytes] = []
        self._lock = threading.Lock()
        self._is_direct = False
        try:
            if size:
                os.posix_fallocate(self._handle, 0, size)
            self._is_direct = self._set_direct(True)
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, values: Bytes, offset: int) -> None:
        """Put `values` at `offset`; they may be changed afterwards."""
        done = 0
        while done < values.size:
            number, start = divmod(offset + done, WINDOW_BYTES)
            count = min(values.size - done, WINDOW_BYTES - start)
            with self._lock:
                window = self._window(number)
            window.memory[start : start + count] = values[done : done + count]
            with self._lock:
                window.missing -= count
                if is_full := window.missing == 0:
                    del self._open[number]
            if is_full:
                self._flush(number, window.memory)
            done += count

    def close(self) -> None:
        os.close(self._handle)

    def finish(self) -> None:
        """Bring everything to the disk and close. All bytes must have come."""
        try:
            os.ftruncate(self._handle, self._size)
            os.fsync(self._handle)
        finally:
            self.close()

    def _window(self, number: int) -> _Window:
        """The window's memory, taken if it is new; the lock is held."""
        if number not in self._open:
            memory = self._free.pop() if self._free else _aligned(WINDOW_BYTES)
            self._open[number] = _Window(memory, min(WINDOW_BYTES, self._size - number * WINDOW_BYTES))
        return self._open[number]

    def _flush(self, number: int, memory: Bytes) -> None:
        start = number * WINDOW_BYTES
        size = min(WINDOW_BYTES, self._size - start)
        if self._is_direct:
            size = _rounded_up(size)  # what is written after the end is cut off again
        done = 0
        while done < size:
            try:
                done += os.pwrite(self._handle, memory[done:size].data, start + done)
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._is_direct = self._set_direct(False)  # this disk wants larger blocks
        with self._lock:
            self._free.append(memory)

    def _set_direct(self, wanted: bool) -> bool:
        """Whether access is direct now. Set after the space is taken, which some file systems do by writing single bytes."""
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        except OSError:
            return False
        return wanted


def _aligned(size: int) -> Bytes:
    return _align(np.empty(size + ALIGNMENT_BYTES, dtype=np.uint8))[:size]


def _align(memory: Bytes) -> Bytes:
    return memory[-memory.ctypes.data % ALIGNMENT_BYTES :]


def _rounded_up(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
