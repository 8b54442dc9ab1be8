"""Safetensors files and folders of them: what lies where, checked against the file's real size, and a streaming writer.

Format: 8 bytes of header length, a JSON header (type, shape, data_offsets a tensor), the data without gaps.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from core.checkpoints.tensors import NUMPY_TYPES, Array, DiskTensor
from core.errors import InputError
from core.files import read_json

INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_MAX_HEADER_BYTES: Final = 100_000_000


class Readable(Protocol):
    """A tensor that can be read when it is needed."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file."""

    file: Path
    header_bytes: bytes
    """The length field and the JSON, as they stand in the file."""
    metadata: dict[str, str]
    tensors: dict[str, DiskTensor]
    """In the order of their place in the file."""

    @property
    def size_bytes(self) -> int:
        return len(self.header_bytes) + sum(tensor.nbytes for tensor in self.tensors.values())


def read_shard(file: Path) -> Shard:
    """The header of a safetensors file. Raises InputError `checkpoints.truncated`, `checkpoints.broken_shard`, `checkpoints.missing`."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length_bytes = stream.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or 8 + length > size:
                raise InputError("checkpoints.truncated", path=str(file), size=size)
            if length > _MAX_HEADER_BYTES:
                raise InputError("checkpoints.broken_shard", path=str(file), reason=f"header {length} bytes")
            text = stream.read(length)
    except FileNotFoundError as error:
        raise InputError("checkpoints.missing", path=str(file)) from error
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {name: _tensor(file, 8 + length, place) for name, place in places}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("checkpoints.broken_shard", path=str(file), reason=str(error)) from error
    shard = Shard(file, length_bytes + text, metadata, tensors)
    end = 8 + length
    for name, tensor in tensors.items():
        if tensor.offset != end or header[name]["data_offsets"][1] + 8 + length != end + tensor.nbytes:
            raise InputError("checkpoints.broken_shard", path=str(file), reason=name)
        end += tensor.nbytes
    if end > size:
        raise InputError("checkpoints.truncated", path=str(file), size=size)
    if end < size:
        raise InputError("checkpoints.broken_shard", path=str(file), reason=f"{size - end} bytes after the last tensor")
    return shard


def read_folder(folder: Path) -> list[Shard]:
    """All weight shards of a Hugging Face model folder, in the order of their names; the index must agree with them.

    Raises InputError `checkpoints.no_weights`, `checkpoints.missing_shard`, `checkpoints.lying_index` and those of read_shard.
    """
    if not (folder / INDEX).exists():
        if not (folder / _SINGLE).exists():
            raise InputError("checkpoints.no_weights", path=str(folder))
        return [read_shard(folder / _SINGLE)]
    place = _weight_map(folder)
    shards = []
    for file in sorted(set(place.values())):
        if Path(file).name != file:
            raise InputError("checkpoints.lying_index", path=str(folder / INDEX), name=file)
        if not (folder / file).exists():
            raise InputError("checkpoints.missing_shard", path=str(folder), name=file)
        shards.append(read_shard(folder / file))
    held = {name: shard.file.name for shard in shards for name in shard.tensors}
    for name in sorted(held.keys() | place.keys()):
        if held.get(name) != place.get(name):
            raise InputError("checkpoints.lying_index", path=str(folder / INDEX), name=name)
    return shards


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    place = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(place, dict) or not place or not all(isinstance(file, str) for file in place.values()):
        raise InputError("checkpoints.lying_index", path=str(folder / INDEX), name="weight_map")
    return place


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file for tensors (name → type, shape) that follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, count = end, 1
        for size in shape:
            count *= size
        end += count * NUMPY_TYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    file: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    values: Iterable[Array],
    metadata: Mapping[str, str],
) -> int:
    """Write `values` one after another (the bits of the types that `tensors` names), sync; returns bytes written."""
    with open(file, "wb", buffering=0) as stream:
        written = _write_all(stream, memoryview(make_header(tensors, metadata)))
        for value in values:
            written += _write_all(stream, value.reshape(-1).view("u1").data if value.size else memoryview(b""))
        os.fsync(stream.fileno())
    return written


def _write_all(stream: Any, view: memoryview) -> int:
    done = 0
    while done < len(view):
        done += stream.write(view[done:])
    return done


def _tensor(file: Path, start: int, place: dict[str, Any]) -> DiskTensor:
    dtype = str(place["dtype"])
    if dtype not in NUMPY_TYPES:
        raise ValueError(f"type {dtype}")
    shape = tuple(int(size) for size in place["shape"])
    return DiskTensor(file, dtype, shape, start + int(place["data_offsets"][0]))
