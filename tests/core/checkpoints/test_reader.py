"""The restricted unpickler: it reads what torch.save wrote as torch does, and no file makes it run anything."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints import reader
from core.checkpoints.reader import Inert, read_torch_file
from core.checkpoints.tensors import DiskTensor, widen
from core.errors import InputError


def write_zip(file: Path, data: bytes, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A torch file with this pickle."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return file


def code_of(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_torch_file(file)
    return caught.value.code


def storage(count: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """Instructions that push the persistent id of a storage and load it (protocol 2)."""
    text = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX" + struct.pack("<I", len(key)) + key.encode()
    return text + b"X\x03\x00\x00\x00cpuK" + bytes([count]) + b"tQ"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, *, count: int = 4) -> bytes:
    """A pickle of one tensor of four floats at most, saying whatever it likes."""
    sizes = b"(" + b"".join(map(number, shape)) + b"t"
    steps = b"(" + b"".join(map(number, stride)) + b"t"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(count)
        + number(offset)
        + sizes
        + steps
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


@pytest.mark.engine
def test_reads_what_torch_reads(tmp_path: Path) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    kinds = (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    saved = {
        "state_dict": OrderedDict(
            plain=base,
            transposed=base.T,
            slice=base[2:, 3:5],
            scalar=torch.tensor(3.5),
            empty=torch.zeros(0, 3),
            parameter=torch.nn.Parameter(base * 2),
            flags=base > 0,
            **{str(kind): (base * 10).to(kind) for kind in kinds},
        ),
        "meta": {"iter": 500, "cfg": "a = 1", "time": 1.5, "none": None, "size": base.size()},
        "optimizer": {"state": {0: {"step": 3}}, "rate": np.float64(0.25), "counts": defaultdict(int, {"a": 2})},
    }
    file = tmp_path / "iter_500.pth"
    torch.save(saved, file)
    found = read_torch_file(file)
    for name, expected in saved["state_dict"].items():
        tensor = found["state_dict"][name]
        assert tensor.shape == tuple(expected.shape)
        values = expected.detach()
        bits = (
            values.contiguous().view(torch.int16).numpy().view(np.uint16)
            if values.dtype == torch.bfloat16
            else values.numpy()
        )
        assert np.array_equal(tensor.read(), bits), name
    assert found["meta"] == {"iter": 500, "cfg": "a = 1", "time": 1.5, "none": None, "size": (6, 8)}
    assert found["optimizer"]["rate"] == 0.25


@pytest.mark.engine
def test_mmengine_s_history_buffers_and_config_are_inert(tmp_path: Path) -> None:
    import torch
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    file = tmp_path / "iter_1.pth"
    torch.save({"message_hub": {"log": HistoryBuffer([1.0, 2.0], [1, 1])}, "cfg": ConfigDict(a=1)}, file)
    found = read_torch_file(file)
    assert isinstance(found["message_hub"]["log"], Inert)
    assert found["cfg"] == {"a": 1}


class Evil:
    """Pickles to a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "builtins.__import__", "runpy.run_path"]
)
def test_a_call_of_code_is_refused_and_not_done(name: str, protocol: int, tmp_path: Path) -> None:
    import importlib

    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(module), attribute)
    mark = tmp_path / "ran"
    argument = f"touch {mark}" if name != "builtins.exec" else f"open({str(mark)!r}, 'w')"
    data = pickle.dumps({"state_dict": Evil(function, argument)}, protocol=protocol)
    file = write_zip(tmp_path / "evil.pth", data)
    with pytest.raises(InputError) as caught:
        read_torch_file(file)
    assert caught.value.code == "checkpoints.unsafe"
    assert caught.value.params["name"].endswith(attribute)
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R.",  # getattr(a string, "system")
        b"cbuiltins\ngetattr\n(cbuiltins\ndict\nS'__subclasses__'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch._utils\n_rebuild_tensor_v2\nS'__globals__'\ntR.",
    ],
)
def test_getattr_looks_nothing_up(data: bytes, tmp_path: Path) -> None:
    found = read_torch_file(write_zip(tmp_path / "file.pth", data))
    assert isinstance(found, Inert)


@pytest.mark.parametrize(
    "name",
    [
        "os.path",
        "torch.load",
        "torch._utils.__dict__",
        "core.files.write_text",
        "builtins.object.__subclasses__",
        "posix.system",
    ],
)
def test_every_other_name_is_refused(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(attribute)])
    assert code_of(write_zip(tmp_path / "file.pth", data + attribute.encode() + b"\x93.")) == "checkpoints.unsafe"


@pytest.mark.parametrize("name", sorted(reader._KNOWN))
def test_no_file_can_change_what_known_names_stand_for(name: str, tmp_path: Path) -> None:
    """BUILD hands a state to what a name stands for; the next file must be read as if that had never been."""
    module, _, attribute = name.rpartition(".")
    start = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"
    before = {
        key: (id(value), getattr(value, "__dict__", None) and dict(value.__dict__))
        for key, value in reader._KNOWN.items()
    }
    for state in (
        b"}X\x05\x00\x00\x00dtypeX\x04\x00\x00\x00evilsb",
        b"(N}X\x05\x00\x00\x00dtypeX\x04\x00\x00\x00eviltb",
        b"K\x01a",
    ):
        with suppress(InputError):
            read_torch_file(write_zip(tmp_path / "evil.pth", b"\x80\x02" + start + state + b"."))
    after = {
        key: (id(value), getattr(value, "__dict__", None) and dict(value.__dict__))
        for key, value in reader._KNOWN.items()
    }
    assert before == after
    found = read_torch_file(
        write_zip(tmp_path / "good.pth", tensor_pickle((2, 2), (2, 1), 0), {"0": np.arange(4, dtype="<f4").tobytes()})
    )
    assert isinstance(found, DiskTensor)
    assert found.dtype == "F32"


def test_a_tensor_stays_inside_its_storage(tmp_path: Path) -> None:
    values = np.arange(4, dtype="<f4")
    lies = {
        "longer": ((5,), (1,), 0),
        "starts late": ((4,), (1,), 1),
        "negative stride": ((2, 2), (-2, 1), 2),
        "negative offset": ((2,), (1,), -1),
        "negative size": ((-2,), (1,), 0),
        "no strides": ((2, 2), (1,), 0),
        "wide stride": ((2,), (100,), 0),
        "expanded without end": ((2**30, 2**20), (0, 0), 0),
    }
    for name, (shape, stride, offset) in lies.items():
        file = write_zip(tmp_path / "file.pth", tensor_pickle(shape, stride, offset), {"0": values.tobytes()})
        assert code_of(file) == "checkpoints.broken_pickle", name
    good = write_zip(tmp_path / "file.pth", tensor_pickle((2, 2), (1, 2), 0), {"0": values.tobytes()})
    assert np.array_equal(read_torch_file(good).read(), [[0, 2], [1, 3]])


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    assert code_of(write_zip(tmp_path / "file.pth", tensor_pickle((2,), (1,), 0))) == "checkpoints.broken_pickle"


@pytest.mark.engine
def test_damage_of_any_kind_is_an_error_for_people(tmp_path: Path) -> None:
    """Bytes changed and cut at random: read to the end or refused, never another exception."""
    import torch

    buffer = io.BytesIO()
    torch.save(
        {
            "state_dict": {"llm.a": torch.randn(4, 4), "llm.b": torch.randn(3)},
            "meta": {"iter": 4, "x": [1, 2.5, None, True]},
        },
        buffer,
    )
    whole = buffer.getvalue()
    random = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for trial in range(1500):
        data = bytearray(whole if trial % 3 else whole[: random.integers(0, len(whole))])
        for _ in range(random.integers(1, 4)):
            if data:
                data[random.integers(0, len(data))] = random.integers(0, 256)
        file = tmp_path / "file.pth"
        file.write_bytes(data)
        try:
            read_torch_file(file)
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100


def test_truncated_missing_foreign_and_old_files(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "whole.pth", tensor_pickle((2, 2), (2, 1), 0), {"0": bytes(16)})
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:-40])
    assert code_of(cut) == "checkpoints.truncated"
    (tmp_path / "empty.pth").write_bytes(b"")
    assert code_of(tmp_path / "empty.pth") == "checkpoints.truncated"
    assert code_of(tmp_path / "nowhere.pth") == "checkpoints.missing"
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": 1}))
    assert code_of(tmp_path / "old.pth") == "checkpoints.not_torch"
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert code_of(tmp_path / "other.zip") == "checkpoints.not_torch"
    assert code_of(tmp_path) == "checkpoints.unreadable"


def test_big_endian_and_compressed_files_are_refused(tmp_path: Path) -> None:
    data = tensor_pickle((2, 2), (2, 1), 0)
    assert (
        code_of(write_zip(tmp_path / "big.pth", data, {"0": bytes(16)}, byteorder=b"big")) == "checkpoints.big_endian"
    )
    with zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
    assert code_of(tmp_path / "small.pth") == "checkpoints.not_torch"


def test_reading_opens_no_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_zip(tmp_path / "file.pth", tensor_pickle((2, 2), (2, 1), 0), {"0": np.ones(4, "<f4").tobytes()})
    tensor = read_torch_file(file)
    file.write_bytes(file.read_bytes().replace(np.ones(4, "<f4").tobytes(), np.zeros(4, "<f4").tobytes()))
    assert not widen(tensor.read(), tensor.dtype).any()
