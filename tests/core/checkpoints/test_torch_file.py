"""Files written in pieces: torch must load them, and any zip reader must find them whole."""

import random
import zipfile
import zlib
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoints.crc import combine, of_parts, of_zeros
from core.checkpoints.reader import read_torch_file
from core.checkpoints.tensors import DiskTensor
from core.checkpoints.torch_file import Room, TorchFile, save
from core.checkpoints.transfer import Move, Piece, Place, move_all


def test_a_crc_is_put_together_from_parts_in_any_order() -> None:
    chance = random.Random(3)
    data = bytearray(chance.randbytes(5000))
    data[100:900] = bytes(800)
    data[4500:] = bytes(500)
    parts = [(0, 100), (900, 1), (901, 3000), (3901, 599)]
    chance.shuffle(parts)
    assert of_parts([(at, size, zlib.crc32(data[at : at + size])) for at, size in parts], 5000) == zlib.crc32(data)
    assert combine(zlib.crc32(data[:7]), zlib.crc32(data[7:]), 4993) == zlib.crc32(data)
    assert of_zeros(12_345) == zlib.crc32(bytes(12_345))
    with pytest.raises(ValueError, match="overlap"):
        of_parts([(0, 10, 1), (9, 10, 1)], 100)


def test_torch_loads_what_is_in_memory_and_what_is_filled_in(tmp_path: Path) -> None:
    tied = torch.randn(3, 5)
    room = Room("F32", (2, 3))
    content = {
        "tied": [tied, tied],
        "turned": torch.arange(12).reshape(3, 4).T,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "number": torch.tensor(4.0),
        "empty": torch.empty(0, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "shapes": OrderedDict(a=torch.Size((2, 3))),
        "room": room,
    }
    file = TorchFile(tmp_path / "iter_4.pth", content)
    values = np.arange(4, dtype=np.float32)
    file.write(room, 8, values.view(np.uint8).data)
    file.filled(room, 8, 16, zlib.crc32(values))
    assert not zipfile.is_zipfile(file.path), "unfinished, it must not pass for a checkpoint"
    file.close()
    file.sync()
    assert zipfile.ZipFile(file.path).testzip() is None
    for mapped in (True, False):
        loaded = torch.load(file.path, weights_only=True, mmap=mapped)
        assert torch.equal(loaded["room"], torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))
        assert loaded["tied"][0].data_ptr() == loaded["tied"][1].data_ptr()
        for key in ("turned", "half", "number", "empty", "parameter"):
            assert torch.equal(loaded[key], content[key])
            assert loaded[key].dtype == content[key].dtype
        assert loaded["shapes"] == content["shapes"]


def test_sizes_past_four_gib_are_found_again(tmp_path: Path) -> None:
    """Sparse: nothing but the ends is on the disk."""
    large, behind = Room("F32", (5 * 2**28,)), Room("BF16", (3,))
    file = TorchFile(tmp_path / "large.pt", {"large": large, "behind": behind, "last": torch.ones(2)})
    ones = np.ones(2, dtype=np.float32)
    file.write(large, large.nbytes - 8, ones.view(np.uint8).data)
    file.filled(large, large.nbytes - 8, 8, zlib.crc32(ones))
    file.close()
    file.sync()
    loaded = torch.load(file.path, mmap=True)
    assert loaded["large"][-3:].tolist() == [0, 1, 1]
    assert (loaded["behind"].tolist(), loaded["last"].tolist()) == ([0, 0, 0], [1, 1])
    infos = {info.filename.partition("/")[2]: info for info in zipfile.ZipFile(file.path).infolist()}
    assert infos["data/0"].file_size == large.nbytes
    assert of_parts([(large.nbytes - 8, 8, zlib.crc32(ones))], large.nbytes) == infos["data/0"].CRC
    assert file.path.stat().st_blocks * 512 < 2**20


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "a.pt", {"weight": torch.arange(9.0), "note": "x"})
    assert (tmp_path / "one/a.pt").read_bytes() == (tmp_path / "two/a.pt").read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_pieces_go_to_their_places_whatever_the_cuts(tmp_path: Path, seed: int) -> None:
    """A tensor in several pieces of several files goes to several rooms; cuts where they fall, blocks of any length."""
    chance = random.Random(seed)
    total = chance.randint(1, 900_000)
    values = torch.randn(total)
    first, second = (
        sorted({0, total, *(chance.randint(0, total) for _ in range(chance.randint(0, 5)))}) for _ in range(2)
    )
    gaps = [chance.randint(0, 9) for _ in range(2 * len(first))]
    pieces = []
    for number, (low, high) in enumerate(pairwise(first)):
        path = tmp_path / f"from_{number}.pt"
        torch.save({"flat": torch.cat([torch.ones(gaps[number]), values[low:high], torch.ones(3)])}, path)
        pieces.append(Piece(read_torch_file(path)["flat"], gaps[number], gaps[number] + high - low))
    places, files = [], []
    for number, (low, high) in enumerate(pairwise(second)):
        room = Room("F32", (high - low + 7,))
        files.append(TorchFile(tmp_path / f"to_{number}.pt", {"flat": room}))
        places.append(Place(files[-1], room, 2, high - low))
    told: list[int] = []
    hashes = move_all([Move(pieces, places, "F32")], told.append)
    for file in files:
        file.close()
        file.sync()
        assert zipfile.ZipFile(file.path).testzip() is None
    parts = [torch.load(file.path)["flat"] for file in files]
    assert all(part[:2].tolist() == [0, 0] and part[-5:].tolist() == [0] * 5 for part in parts)
    assert torch.equal(torch.cat([part[2:-5] for part in parts]), values)
    assert sum(told) == 4 * total
    back = [
        Piece(read_torch_file(file.path)["flat"], 2, 2 + place.count) for file, place in zip(files, places, strict=True)
    ]
    assert move_all([Move(back, (), "F32")], told.append) == hashes


def test_values_are_rounded_to_the_rooms_type_as_torch_rounds_them(tmp_path: Path) -> None:
    values = torch.randn(300_000) * 1e3
    torch.save(values, tmp_path / "from.pt")
    source = read_torch_file(tmp_path / "from.pt")
    assert isinstance(source, DiskTensor)
    room = Room("BF16", (values.numel(),))
    file = TorchFile(tmp_path / "to.pt", room)
    move_all([Move([Piece(source, 0, source.numel)], [Place(file, room, 0, source.numel)], "BF16")], lambda _: None)
    file.close()
    file.sync()
    assert torch.equal(torch.load(file.path), values.to(torch.bfloat16))


def test_a_file_that_ends_too_soon_stops_all(tmp_path: Path) -> None:
    torch.save(torch.ones(1000), tmp_path / "from.pt")
    source = read_torch_file(tmp_path / "from.pt")
    with open(tmp_path / "from.pt", "r+b") as stream:
        stream.truncate(1500)
    with pytest.raises(Exception, match="truncated"):
        move_all([Move([Piece(source, 0, 1000)], (), "F32")], lambda _: None)
