"""Direct access gives the bytes that ordinary access gives, at any offset and size, and gives way where it is not to be had."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints import direct
from core.checkpoints.direct import DirectReader, DirectWriter
from core.errors import InputError

SIZE = 3 * 8192 + 4097


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(direct, "WINDOW_BYTES", 8192)
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


def fill(file: Path, content: np.ndarray) -> DirectWriter:
    """Pieces of odd sizes from several threads, the last first."""
    writer = DirectWriter(file, content.size)
    starts = [*range(0, content.size, 1111)][::-1]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda start: writer.write(content[start : start + 1111].copy(), start), starts))
    return writer


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_pieces_in_any_order_become_the_file(place: str, content: np.ndarray, tmp_path: Path) -> None:
    file = (tmp_path if place == "disk" else Path("/dev/shm")) / f"danlu_direct_{os.getpid()}"
    try:
        fill(file, content).finish()
        assert file.read_bytes() == content.tobytes()
        with DirectReader(file) as reader:
            for offset, size in [(0, SIZE), (1, 1), (4095, 4098), (SIZE - 3, 3), (8192, 0)]:
                assert reader.read(offset, size).tobytes() == content[offset : offset + size].tobytes()
    finally:
        file.unlink(missing_ok=True)


def test_cached_and_uncached_bytes_are_the_same(content: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "file"
    fill(file, content).finish()
    with DirectReader(file) as reader:
        assert reader.read(5, 9000).tobytes() == content[5:9005].tobytes()
    file.read_bytes()
    with open(file, "r+b") as stream:  # what is in the cache but not yet on the disk counts
        stream.seek(7)
        stream.write(b"new")
        stream.flush()
        with DirectReader(file) as reader:
            assert reader.read(7, 3).tobytes() == b"new"


def test_a_file_cut_short_is_told(content: np.ndarray, tmp_path: Path) -> None:
    for size in (0, 5000):
        (tmp_path / "file").write_bytes(content.tobytes()[:size])
        with DirectReader(tmp_path / "file") as reader, pytest.raises(InputError) as caught:
            reader.read(4096, 2000)
        assert (caught.value.code, caught.value.params["size"]) == ("checkpoints.truncated", size)


def test_a_disk_with_larger_blocks_is_written_through_the_cache(
    content: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def pwrite(handle: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    fill(tmp_path / "file", content).finish()
    assert (tmp_path / "file").read_bytes() == content.tobytes()


def test_few_windows_are_open_when_the_file_is_filled_in_order(content: np.ndarray, tmp_path: Path) -> None:
    writer = DirectWriter(tmp_path / "file", content.size)
    for start in range(0, content.size, 1000):
        writer.write(content[start : start + 1000], start)
        assert len(writer._open) <= 1
    writer.finish()
    assert len(writer._free) <= 1
