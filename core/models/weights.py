"""Reads what weight files say of themselves: safetensors headers, shard indices, git-lfs pointers. Loads no tensor."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.messages import Message, message

INDICES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_LFS: Final = b"version https://git-lfs.github.com/spec/"
_HEADER_LIMIT_BYTES: Final = 100_000_000
"""The format's own limit on a header."""
_BITS: Final = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
_BYTES_OF_DTYPE: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass
class Weights:
    """What is known of a folder's weights without loading them."""

    files: list[Path] = field(default_factory=list)
    parameters: int | None = None
    dtype: str | None = None
    """The dtype most parameters have, as safetensors names it (BF16, F32, …)."""
    tensor_names: set[str] = field(default_factory=set)
    problems: list[Message] = field(default_factory=list)
    header_digest: str = ""
    """Hash over file names, sizes and headers: changes when a tensor's name, shape or place changes."""


class BrokenHeader(ValueError):
    """A safetensors file whose header cannot be believed."""


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the file's size. Raises BrokenHeader."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(_HEADER_LIMIT_BYTES, size - 8):
            raise BrokenHeader("header length")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BrokenHeader(str(error)) from error
    try:
        end = max(
            (int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"), default=0
        )
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise BrokenHeader("data_offsets") from error
    if end + 8 + length != size:
        raise BrokenHeader(f"{size} != {end + 8 + length}")
    return dict(header)


def is_lfs_pointer(file: Path) -> bool:
    """Whether `file` is a git-lfs pointer in place of the real file."""
    if file.stat().st_size > 1024:
        return False
    with open(file, "rb") as stream:
        return stream.read(len(_LFS)) == _LFS


def read_weights(folder: Path, config_dtype: str | None) -> Weights:
    """All weight files of `folder`, safetensors first. `config_dtype`: the config's torch_dtype, for `.bin` files."""
    weights = Weights()
    _read_index(folder, weights)
    safetensors = sorted(folder.glob("*.safetensors"))
    others = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("model*.bin")])
    weights.files = safetensors or others
    digest = hashlib.sha256()
    pointers = [file for file in weights.files if is_lfs_pointer(file)]
    if pointers:
        weights.problems.append(message("models.problems.lfs_pointer", files=_names(pointers)))
    if safetensors:
        _read_safetensors([file for file in safetensors if file not in pointers], weights, digest)
    elif others and not pointers:
        width = _BYTES_OF_DTYPE.get(config_dtype or "", 2)
        weights.parameters = sum(file.stat().st_size for file in others) // width
    else:
        weights.problems.extend([] if pointers else [message("models.problems.no_weights")])
    for file in weights.files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    weights.header_digest = digest.hexdigest()
    return weights


def _read_safetensors(files: list[Path], weights: Weights, digest: Any) -> None:
    count: Counter[str] = Counter()
    broken = []
    for file in files:
        try:
            header = read_header(file)
        except BrokenHeader:
            broken.append(file)
            continue
        digest.update(json.dumps(header, sort_keys=True).encode())
        for name, tensor in header.items():
            if name != "__metadata__":
                weights.tensor_names.add(name)
                count[str(tensor.get("dtype"))] += math.prod(tensor.get("shape", []))
    if broken:
        weights.problems.append(message("models.problems.broken_file", files=_names(broken)))
    weights.parameters = sum(count.values()) or None
    weights.dtype = count.most_common(1)[0][0] if count else None


def _read_index(folder: Path, weights: Weights) -> None:
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is None:
        return
    try:
        places = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        weights.problems.append(message("models.problems.broken_index", file=index.name))
        return
    if missing := sorted(str(name) for name in places if not (folder / str(name)).is_file()):
        weights.problems.append(
            message("models.problems.missing_shard", index=index.name, files=", ".join(missing[:5]), count=len(missing))
        )


def _names(files: list[Path]) -> str:
    names = [file.name for file in files[:5]]
    return ", ".join(names) + (" …" if len(files) > 5 else "")
