"""Writes files that torch.load reads, with room for tensors that are filled in later, in any order, by several threads.

torch.save needs every tensor in memory and copies it; here a tensor can be a `Room`, whose bytes go straight to their place. The form
is torch's own since 1.6: a zip of stored entries, one a storage, each at a multiple of 64 bytes (`caffe2/serialize/inline_container.cc`).
The zip's directory comes last: a file that is not finished is no torch file.
"""

import io
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.checkpoints.crc import of_parts
from core.checkpoints.tensors import NUMPY_TYPES

_ALIGNMENT_BYTES: Final = 64
_SMALL: Final = 0xFFFFFFFF
"""Sizes and offsets from here on need zip64's longer fields."""
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64: Final = struct.Struct("<4sLQL")
_FILLER: Final = 0x4246  # "FB", as torch names the extra field that aligns
_UTF8: Final = 1 << 11
_VERSION_NEEDED: Final = 45
_1980: Final = 33
"""The earliest date a zip can have: the same content gives the same bytes."""
_STORAGES: Final = {
    "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F64": "DoubleStorage", "I64": "LongStorage",
    "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage", "BOOL": "BoolStorage",
}  # fmt: skip
_TYPE_NAMES: Final = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """A tensor whose bytes are filled in later; what is never filled in is zero."""

    dtype: str
    """Name of the type as safetensors writes it."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.numel * NUMPY_TYPES[self.dtype].itemsize


@dataclass(slots=True)
class _Entry:
    name: str
    size: int
    content: memoryview | None = None
    """None: filled in later."""
    header_offset: int = 0
    offset: int = 0
    """Of its first byte in the file."""
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    """(offset in the entry, bytes, CRC) of what was filled in."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """Pickled as a reference to an entry."""

    key: str
    dtype: str
    numel: int


class TorchFile:
    """One file being written. `fill` may be called from several threads; `close` makes it a torch file."""

    def __init__(self, path: Path, content: Any) -> None:
        """`content` as for torch.save, with `Room`s in it. Tensors that are in memory are written at once."""
        self.path = path
        self._rooms: dict[int, _Entry] = {}
        self._entries = self._lay_out(path.name.partition(".")[0], content)
        self._end = self._entries[-1].offset + self._entries[-1].size
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.truncate(self._handle, self._end)
            for entry in self._entries:
                if entry.content is not None:
                    self._write(entry.offset, entry.content)
                    entry.parts.append((0, entry.size, zlib.crc32(entry.content)))
                    entry.content = None
        except BaseException:
            self.abandon()
            raise

    def _lay_out(self, prefix: str, content: Any) -> list[_Entry]:
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(content)
        described = [
            _Entry(name, len(data), memoryview(data))
            for name, data in (("data.pkl", stream.getvalue()), ("byteorder", b"little"))
        ]
        entries = [*described, *pickler.entries.values(), _Entry("version", 2, memoryview(b"3\n"))]
        self._rooms = pickler.rooms
        self._kept = pickler.kept
        position = 0
        for entry in entries:
            entry.name = f"{prefix}/{entry.name}"
            entry.header_offset = position
            entry.offset = position + len(_local_header(entry, 0))
            position = entry.offset + entry.size
        return entries

    @property
    def rooms(self) -> list[Room]:
        return [kept for kept in self._kept if isinstance(kept, Room)]

    def write(self, room: Room, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` bytes from the room's start. Tell `filled` once a stretch of them is written."""
        self._write(self._rooms[id(room)].offset + offset, data)

    def filled(self, room: Room, offset: int, count: int, crc: int) -> None:
        """`count` bytes at `offset` of the room were written; `crc`: their CRC-32."""
        self._rooms[id(room)].parts.append((offset, count, crc))

    def close(self) -> None:
        """Write the checksums and the directory. The data may still be in the kernel's memory: see `sync`."""
        directory = b""
        for entry in self._entries:
            crc = of_parts(entry.parts, entry.size)
            self._write(entry.header_offset, memoryview(_local_header(entry, crc)))
            directory += _central_header(entry, crc)
        self._write(self._end, memoryview(directory + _end_records(len(self._entries), self._end, len(directory))))

    def sync(self) -> None:
        """Wait until everything is on the disk, and give the file back."""
        try:
            os.fsync(self._handle)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give the file back as it is. Nothing if that was done."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._handle, data[done : done + 2**30], offset + done)


def save(path: Path, content: Any) -> None:
    """Write `content`, whose tensors are all in memory or mapped, and wait until it is on the disk."""
    file = TorchFile(path, content)
    file.close()
    file.sync()


class _Pickler(pickle.Pickler):
    """Puts tensors aside as entries; everything else is pickled as it is."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.entries: dict[Any, _Entry] = {}
        self.rooms: dict[int, _Entry] = {}
        self.kept: list[Any] = []
        """Rooms and arrays are known by their address, so they must stay."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if isinstance(value, Room):
            self.kept.append(value)
            entry = self._entry(id(value), value.nbytes, None)
            self.rooms[id(value)] = entry
            return _rebuilt(_Storage(_key(entry), value.dtype, value.numel), value.shape)
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach())
        return NotImplemented

    def _tensor(self, tensor: Any) -> Any:
        dtype = _TYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        # Tied weights are one tensor under two names: one entry, so that they stay tied.
        place = (tensor.data_ptr() or id(tensor), tensor.numel(), tensor.stride(), dtype)
        array = tensor.cpu().reshape(-1).view(_uint8()).numpy()
        self.kept.append((tensor, array))
        entry = self._entry(place, array.size, memoryview(array))
        return _rebuilt(_Storage(_key(entry), dtype, tensor.numel()), tuple(tensor.shape))

    def _entry(self, place: Any, size: int, content: memoryview | None) -> _Entry:
        if place not in self.entries:
            self.entries[place] = _Entry(f"data/{len(self.entries)}", size, content)
        return self.entries[place]

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        import torch

        return ("storage", getattr(torch, _STORAGES[value.dtype]), value.key, "cpu", value.numel)


def _uint8() -> Any:
    import torch

    return torch.uint8


def _key(entry: _Entry) -> str:
    return entry.name.removeprefix("data/")


def _rebuilt(storage: _Storage, shape: tuple[int, ...]) -> tuple[Any, tuple[Any, ...]]:
    """How torch pickles a tensor whose rows lie one after the other."""
    from torch._utils import _rebuild_tensor_v2

    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return _rebuild_tensor_v2, (storage, 0, shape, tuple(reversed(strides)), False, OrderedDict())


def _local_header(entry: _Entry, crc: int) -> bytes:
    """The header before an entry, as long as its data then starts at a multiple of 64 bytes."""
    name = entry.name.encode()
    size = min(entry.size, _SMALL)
    extra = struct.pack("<2H2Q", 1, 16, entry.size, entry.size) if size == _SMALL else b""
    missing = -(entry.header_offset + _LOCAL.size + len(name) + len(extra) + 4) % _ALIGNMENT_BYTES
    extra += struct.pack("<2H", _FILLER, missing) + b"Z" * missing
    fixed = _LOCAL.pack(b"PK\x03\x04", _VERSION_NEEDED, _UTF8, 0, 0, _1980, crc, size, size, len(name), len(extra))
    return fixed + name + extra


def _central_header(entry: _Entry, crc: int) -> bytes:
    name = entry.name.encode()
    long = [entry.size, entry.size] if entry.size >= _SMALL else []
    long += [entry.header_offset] if entry.header_offset >= _SMALL else []
    extra = struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    size, offset = min(entry.size, _SMALL), min(entry.header_offset, _SMALL)
    fixed = _CENTRAL.pack(
        b"PK\x01\x02", _VERSION_NEEDED, _VERSION_NEEDED, _UTF8, 0, 0, _1980, crc, size, size, len(name), len(extra), 0, 0, 0, 0, offset
    )  # fmt: skip
    return fixed + name + extra


def _end_records(count: int, offset: int, size: int) -> bytes:
    """The end of the directory that begins at `offset` and has `size` bytes, for `count` entries."""
    end = _END.pack(b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), size, min(offset, _SMALL), 0)
    if count < 0xFFFF and offset < _SMALL:
        return end
    longer = _END64.pack(b"PK\x06\x06", 44, _VERSION_NEEDED, _VERSION_NEEDED, 0, 0, count, count, size, offset)
    return longer + _LOCATOR64.pack(b"PK\x06\x07", 0, offset + size, 1) + end
