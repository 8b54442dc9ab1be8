"""Reads what torch.save wrote, without torch and without running any code from the file.

A torch file is a zip with a pickle (`data.pkl`) and one stored entry a storage. The unpickler here knows a fixed list of names
(what XTuner, mmengine and DeepSpeed write), builds inert stand-ins for them, and refuses every other name.
Tensors stay on disk (`DiskTensor`): the optimizer state is never read unless someone asks for it.
"""

import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.checkpoints.tensors import NUMPY_TYPES, DiskTensor
from core.errors import InputError

_MAX_PICKLE_BYTES: Final = 1 << 30
_DAMAGE: Final = (
    pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, MemoryError, RuntimeError,
    ImportError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What damaged bytes can raise in the zip reader and the unpickler: nearly anything."""
_STORAGES: Final = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}  # fmt: skip
_DTYPES: Final = (
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "float", "half", "long",
)  # fmt: skip


@dataclass(slots=True)
class Inert:
    """Stands for an object of a class that is known but not needed: its name, arguments and state, no behaviour."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Items of a list-like class (deque) go to the state."""
        if not isinstance(self.state, list):
            self.state = []
        self.state.append(item)

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)


class InertDict(dict[Any, Any]):
    """Stands for a known subclass of dict; keeps the items, drops attributes."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Storage:
    file: Path
    offset: int
    count: int
    dtype: str


class _Sealed:
    """Stands for a function or class that a pickle may call.

    The BUILD instruction can set attributes of what it gets, so this lets none be set: a hostile file could else change how the next
    one is read.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"state for {self._function}")


class _StorageType(_Sealed):
    """A kind of storage; `dtype` is its elements' type."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        super().__init__(lambda *_: self)
        self.dtype = dtype


def _maker(name: str) -> _Sealed:
    """Called in place of a class; `__new__` of protocol 2 (NEWOBJ) needs a real class, see `_inert_class`."""
    return _Sealed(lambda *arguments: Inert(name, arguments))


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote to `path`, tensors as `DiskTensor`. Runs no code from the file, reads no tensor.

    Raises InputError: `checkpoints.not_torch` (no torch zip, or the format before torch 1.6), `checkpoints.truncated`,
    `checkpoints.unsafe` (the pickle names something that is not on the list), `checkpoints.broken_pickle`.
    """
    try:
        with _open_zip(path) as archive:
            return _load(path, archive)
    except FileNotFoundError as error:
        raise InputError("checkpoints.missing", path=str(path)) from error
    except OSError as error:
        raise InputError("checkpoints.unreadable", path=str(path), reason=error.strerror or str(error)) from error
    except _DAMAGE as error:
        raise InputError("checkpoints.broken_pickle", path=str(path), reason=str(error)) from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise _explain_bad_zip(path) from error


def _load(path: Path, archive: zipfile.ZipFile) -> Any:
    pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise InputError("checkpoints.not_torch", path=str(path))
    prefix = pickles[0].filename.removesuffix("data.pkl")
    names = {info.filename for info in archive.infolist()}
    if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
        raise InputError("checkpoints.big_endian", path=str(path))
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise InputError("checkpoints.broken_pickle", path=str(path), reason="data.pkl > 1 GiB")
    offsets = dict(_storage_offsets(path, archive, prefix))
    with archive.open(pickles[0]) as stream:
        return _Unpickler(stream, path, offsets).load()


def _storage_offsets(path: Path, archive: zipfile.ZipFile, prefix: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Key of each storage → where its bytes start, and how many. A local header gives the start: its extra field pads to 64."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        for info in archive.infolist():
            if not info.filename.startswith(f"{prefix}data/"):
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                raise InputError("checkpoints.not_torch", path=str(path))
            header = os.pread(stream.fileno(), 30, info.header_offset)
            if len(header) < 30:
                raise InputError("checkpoints.truncated", path=str(path), size=size)
            name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
            start = info.header_offset + 30 + name_bytes + extra_bytes
            if start + info.file_size > size:
                raise InputError("checkpoints.truncated", path=str(path), size=size)
            yield info.filename.removeprefix(f"{prefix}data/"), (start, info.file_size)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, path: Path, offsets: dict[str, tuple[int, int]]) -> None:
        super().__init__(stream)
        self._path = path
        self._offsets = offsets

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise InputError("checkpoints.unsafe", path=str(self._path), name=f"{module}.{name}")
        return Inert(known.name) if isinstance(known, Inert) else known

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _location, numel = pid
        if tag != "storage" or not isinstance(kind, _StorageType) or str(key) not in self._offsets:
            raise InputError("checkpoints.broken_pickle", path=str(self._path), reason=f"storage {key!r}")
        del numel  # what the file really holds counts
        start, size = self._offsets[str(key)]
        return _Storage(self._path, start, size // NUMPY_TYPES[kind.dtype].itemsize, kind.dtype)


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> DiskTensor:
    shape, steps, first = _size(size), _size(stride), int(offset)
    if len(shape) != len(steps) or min((*shape, *steps, first, 0)) < 0:
        raise ValueError(f"tensor of shape {shape}, stride {steps}, offset {first}")
    reach = first + sum((count - 1) * step for count, step in zip(shape, steps, strict=True)) + 1
    tensor = DiskTensor(
        storage.file, storage.dtype, shape, storage.offset + first * NUMPY_TYPES[storage.dtype].itemsize, steps
    )
    # An expanded tensor (stride 0) could ask for any amount of memory, so it is bound by its storage too.
    if tensor.numel and (reach > storage.count or tensor.numel > storage.count):
        raise ValueError(f"tensor of shape {shape}, stride {steps}, offset {first} in a storage of {storage.count}")
    return tensor


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _typed(rebuild: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    """A tensor that carried attributes (DeepSpeed marks its flat groups so); the attributes are dropped."""
    del kind, state
    return rebuild(*arguments) if rebuild in (_REBUILD_TENSOR, _REBUILD_PARAMETER) else Inert("torch.Tensor")


_REBUILD_TENSOR: Final = _Sealed(_tensor)
_REBUILD_PARAMETER: Final = _Sealed(_parameter)


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _numpy_dtype(*arguments: Any) -> Inert:
    return Inert("numpy.dtype", arguments)


def _numpy_scalar(kind: Any, data: Any = b"") -> Any:
    """A number, if it is one; else an inert stand-in."""
    text = str(kind.arguments[0]) if isinstance(kind, Inert) and kind.arguments else ""
    if text[:1] in "fiub" and isinstance(data, (bytes, str)):
        raw = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(raw, dtype=np.dtype(text))[0].item()
    return Inert("numpy.scalar", (kind, data))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding not in ("ascii", "utf-8", "utf8") else encoding)


def _set(items: Any = ()) -> set[Any]:
    return set(items)


def _defaultdict(*_: Any) -> dict[Any, Any]:
    return InertDict()


def _inert_class(name: str) -> type[Inert]:
    """A class for pickles that make objects by `cls.__new__(cls)` (NEWOBJ, copyreg)."""

    def new(cls: type[Inert], *arguments: Any, **_: Any) -> Inert:
        made = object.__new__(cls)
        made.name, made.arguments, made.state = name, arguments, None
        return made

    def init(self: Inert, *arguments: Any, **_: Any) -> None:
        del self, arguments

    return type(name.rpartition(".")[2], (Inert,), {"__new__": new, "__init__": init, "__slots__": ()})


_MADE_EMPTY: Final[tuple[Any, ...]] = (Inert, dict)


def _reconstruct(cls: Any, base: Any, state: Any = None) -> Any:
    """`cls` may only be one of the stand-ins below, or a plain dict."""
    del base, state
    return cls() if isinstance(cls, type) and issubclass(cls, _MADE_EMPTY) else Inert(str(cls))


def _known() -> dict[str, Callable[..., Any] | Any]:
    """Every name a checkpoint may hold → what stands for it."""
    known: dict[str, Any] = {f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()}
    known |= {f"torch.storage.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()}
    known |= {f"torch.{name}": Inert(f"torch.{name}") for name in _DTYPES}
    known |= {
        "torch._utils._rebuild_tensor_v2": _REBUILD_TENSOR,
        "torch._utils._rebuild_tensor": _REBUILD_TENSOR,
        "torch._utils._rebuild_parameter": _REBUILD_PARAMETER,
        "torch._utils._rebuild_parameter_with_state": _REBUILD_PARAMETER,
        "torch._tensor._rebuild_from_type_v2": _Sealed(_typed),
        "torch.Tensor": Inert("torch.Tensor"),
        "torch.nn.parameter.Parameter": Inert("torch.nn.parameter.Parameter"),
        "torch.Size": _Sealed(_size),
        "torch.device": _maker("torch.device"),
        "torch.serialization._get_layout": _maker("torch.layout"),
        "collections.OrderedDict": OrderedDict,
        "collections.defaultdict": _Sealed(_defaultdict),
        "collections.deque": _inert_class("collections.deque"),
        "copyreg._reconstructor": _Sealed(_reconstruct),
        "numpy.dtype": _Sealed(_numpy_dtype),
        "numpy.ndarray": _inert_class("numpy.ndarray"),
        "_codecs.encode": _Sealed(_encode),
        "mmengine.config.config.ConfigDict": InertDict,
    }
    for module in ("builtins", "__builtin__"):
        known |= {f"{module}.{kind.__name__}": kind for kind in (dict, list, tuple, int, float, bool, str, complex)}
        known |= {f"{module}.long": int, f"{module}.unicode": str}  # protocol 2 keeps Python 2's names
        known |= {
            f"{module}.set": _Sealed(_set),
            f"{module}.frozenset": frozenset,
            f"{module}.object": _inert_class("object"),
        }
        known[f"{module}.slice"] = _maker("slice")
        # HistoryBuffer is pickled with `getattr(HistoryBuffer, "mean")`: the stand-in looks nothing up.
        known[f"{module}.getattr"] = _maker("getattr")
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known |= {f"{module}._reconstruct": _Sealed(_reconstruct), f"{module}.scalar": _Sealed(_numpy_scalar)}
    for name in _INERT:
        known[name] = _inert_class(name)
    return known


_INERT: Final = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
    "mmengine.config.config.Config",
    "mmengine.config.lazy.LazyObject",
    "mmengine.config.lazy.LazyAttr",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
    "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig",
    "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "argparse.Namespace",
    "datetime.datetime",
)
_KNOWN: Final = _known()


def _explain_bad_zip(path: Path) -> InputError:
    """A zip cut short, a torch file from before 1.6, or something else."""
    with open(path, "rb") as stream:
        start = stream.read(4)
    size = path.stat().st_size
    if size == 0 or start.startswith(b"PK"):
        return InputError("checkpoints.truncated", path=str(path), size=size)
    return InputError("checkpoints.not_torch", path=str(path))
