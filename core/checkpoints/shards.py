"""Weight files of a model folder, safetensors or torch's own (.bin): what lies where, checked against the file's real size, and a
streaming writer of safetensors.

Format: 8 bytes of header length, a JSON header (type, shape, data_offsets a tensor), the data without gaps.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from core.checkpoints.reader import read_torch_file
from core.checkpoints.tensors import NUMPY_TYPES, Array, DiskTensor
from core.errors import InputError
from core.files import read_json

INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_TORCH_INDEX: Final = "pytorch_model.bin.index.json"
_TORCH_SINGLE: Final = "pytorch_model.bin"
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
    """One weight file."""

    file: Path
    header_bytes: bytes
    """The length field and the JSON, as they stand in the file; for one of torch's as they stand in `safetensors_name`."""
    metadata: dict[str, str]
    tensors: dict[str, DiskTensor]
    """In the order of their place in the file."""

    @property
    def safetensors_name(self) -> str:
        """What the file is called as safetensors: pytorch_model-00001-of-00002.bin is model-00001-of-00002.safetensors."""
        if self.file.suffix == ".safetensors":
            return self.file.name
        return f"model{self.file.stem.removeprefix('pytorch_model')}.safetensors"

    @property
    def size_bytes(self) -> int:
        """As safetensors."""
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


def read_torch_shard(file: Path, *, is_tied: bool = False) -> Shard:
    """A state dict that torch.save wrote, read without running code in it. `is_tied`: names that share their values come once.

    Raises InputError `checkpoints.no_weights` and those of read_torch_file.
    """
    content = read_torch_file(file)
    items = content.items() if isinstance(content, dict) else ()
    tensors: dict[str, DiskTensor] = {}
    for name, tensor in items:
        if isinstance(tensor, DiskTensor) and not (is_tied and tensor in tensors.values()):
            tensors[str(name)] = tensor
    if not tensors:
        raise InputError("checkpoints.no_weights", path=str(file))
    metadata = {"format": "pt"}
    header = make_header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata)
    return Shard(file, header, metadata, tensors)


def read_folder(folder: Path) -> list[Shard]:
    """All weight shards of a Hugging Face model folder, in the order of their names; the index must agree with them. Files of torch's
    (.bin) are only read where there is no safetensors.

    Raises InputError `checkpoints.no_weights`, `checkpoints.missing_shard`, `checkpoints.lying_index` and those of read_shard and
    read_torch_shard.
    """
    for index, single in ((INDEX, _SINGLE), (_TORCH_INDEX, _TORCH_SINGLE)):
        if (folder / index).exists():
            return _read_indexed(folder, folder / index)
        if (folder / single).exists():
            return [_read(folder / single)]
    raise InputError("checkpoints.no_weights", path=str(folder))


def _read(file: Path) -> Shard:
    if file.suffix == ".safetensors":
        return read_shard(file)
    config = read_json(file.parent / "config.json") if (file.parent / "config.json").is_file() else {}
    return read_torch_shard(file, is_tied=bool(config.get("tie_word_embeddings")))


def _read_indexed(folder: Path, index: Path) -> list[Shard]:
    place = _weight_map(index)
    shards = []
    for file in sorted(set(place.values())):
        if Path(file).name != file:
            raise InputError("checkpoints.lying_index", path=str(index), name=file)
        if not (folder / file).exists():
            raise InputError("checkpoints.missing_shard", path=str(folder), name=file)
        shards.append(_read(folder / file))
    held = {name: shard.file.name for shard in shards for name in shard.tensors}
    for name in sorted(held.keys() | place.keys()):
        if held.get(name) != place.get(name):
            raise InputError("checkpoints.lying_index", path=str(index), name=name)
    return shards


def _weight_map(file: Path) -> dict[str, str]:
    index = read_json(file)
    place = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(place, dict) or not place or not all(isinstance(name, str) for name in place.values()):
        raise InputError("checkpoints.lying_index", path=str(file), name="weight_map")
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
