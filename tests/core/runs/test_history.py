"""What is kept of runs: notes, differences, bundles, curves for TensorBoard, energy and utilisation."""

import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import MachineError
from core.files import write_json
from core.runs.bundle import app_commit, write_bundle
from core.runs.compare import differences
from core.runs.directory import RunDirectory
from core.runs.launch import now_utc
from core.runs.metrics import COLUMNS, merge_resumes
from core.runs.notes import Notes, clean_tags, read_notes, write_notes
from core.runs.sampling import Sampler
from core.runs.state import Phase, read_status
from core.runs.summary import summarize
from core.runs.tensorboard import masked_crc, record, write_events
from core.runs.utilisation import Shape, flops_per_token, mfu, peak_flops, shape_of
from tests.core.runs.conftest import Start, wait_for


def make_run(folder: Path, config: str = "lr = 2e-4\n", **details: Any) -> RunDirectory:
    run = RunDirectory(folder)
    run.source.mkdir(parents=True)
    (run.source / "tiny.py").write_text(config, encoding="utf-8")
    spec = {"id": run.id, "kind": "train", "title": "t", "argv": ["/x"], "cwd": "/", "created_at": now_utc()}
    write_json(run.spec_file, spec | {"details": details})
    return run


def test_notes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert read_notes(run) == Notes()
    write_notes(run, Notes((" good ", "good", "", "基线"), " first try\n"))
    assert read_notes(run) == Notes(("good", "基线"), "first try")
    for broken in ("{", "[]", '{"tags": 3, "text": null}'):
        run.notes_file.write_text(broken, encoding="utf-8")
        assert read_notes(run) == Notes()
    assert len(clean_tags([str(number) for number in range(100)])) == 20


CONFIG = """from transformers import AutoTokenizer
pretrained_model_name_or_path = "/m"
lr = {lr}  # a comment
max_length = 2048
optim_wrapper = dict(optimizer=dict(lr=lr))
train_dataset = dict(max_length=max_length)
"""


def test_differences_are_by_meaning(tmp_path: Path) -> None:
    data = [{"path": "/d/a.jsonl", "rows": 3, "sha256": "a" * 64}]
    first = make_run(tmp_path / "a", CONFIG.format(lr="2e-4"), data=data, seed=1, versions={"torch": "2.7"})
    same = make_run(
        tmp_path / "b", "\n# moved\n" + CONFIG.format(lr="0.0002"), data=data, seed=1, versions={"torch": "2.7"}
    )
    assert differences([first, same]) == []
    other = [{"path": "/d/a.jsonl", "rows": 3, "sha256": "b" * 64}]
    third = make_run(tmp_path / "c", CONFIG.format(lr="1e-5"), data=other, seed=1, versions={"torch": "2.8"})
    found = {(each.group, each.name): each.values for each in differences([first, third])}
    assert set(found) == {("config", "lr"), ("data", "data"), ("versions", "torch")}
    assert found["versions", "torch"] == ("2.7", "2.8")
    by_hand = RunDirectory(tmp_path / "hand")
    assert all(each.values[1] is None for each in differences([first, by_hand]))


def test_bundle_holds_what_is_needed_and_no_secret(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.metrics_file.write_text('{"iteration": 1}\n', encoding="utf-8")
    (run.path / "iter_1.pth").write_bytes(b"weights")
    write_json(run.watch_file, {"webhook": "https://example.com/secret-token", "stop_on": ["nan"]})
    path = write_bundle(run, tmp_path / "out" / "run.zip")
    with zipfile.ZipFile(path) as bundle:
        names = set(bundle.namelist())
        content = {name: bundle.read(name) for name in names}
    assert {"run/run.json", "run/metrics.jsonl", "run/source/tiny.py", "run/provenance.json"} <= names
    assert "run/iter_1.pth" not in names
    assert not any(b"secret-token" in each for each in content.values())
    proof = json.loads(content["run/provenance.json"])
    assert proof["packages"]["numpy"] == np.__version__
    assert proof["files"]["iter_1.pth"]["bytes"] == 7
    assert len(proof["files"]["iter_1.pth"]["sha256"]) == 64
    with pytest.raises(MachineError):
        write_bundle(run, run.spec_file / "x.zip")


def test_app_commit_from_files(tmp_path: Path) -> None:
    assert app_commit(tmp_path) is None
    git = tmp_path / ".git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert app_commit(tmp_path) is None
    (git / "packed-refs").write_text("# pack-refs\n" + "1" * 40 + " refs/heads/main\n")
    assert app_commit(tmp_path) == "1" * 40
    (git / "refs/heads").mkdir(parents=True)
    (git / "refs/heads/main").write_text("2" * 40 + "\n")
    assert app_commit(tmp_path) == "2" * 40
    (git / "HEAD").write_text("3" * 40 + "\n")
    assert app_commit(tmp_path) == "3" * 40


def test_crc_is_castagnolis() -> None:
    """Test vectors of RFC 3720, appendix B.4, unmasked as record_writer.h masks."""
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        unrotated = (masked_crc(data) - 0xA282EAD8) & 0xFFFFFFFF
        assert ((unrotated >> 17) | (unrotated << 15)) & 0xFFFFFFFF == crc


def test_event_file_can_be_read_back(tmp_path: Path) -> None:
    rows = np.full((3, len(COLUMNS)), np.nan)
    rows[:, COLUMNS.index("iteration")] = [1, 2, 300]
    rows[:, COLUMNS.index("loss")] = [3.0, math.nan, 1.5]
    rows[:, COLUMNS.index("at")] = [10.0, 11.0, 12.5]
    validation = [(0, 4.0), (200, 2.5)]
    events = read_records(write_events(merge_resumes(rows), tmp_path / "events", validation).read_bytes())
    assert events[0].endswith(b"brain.Event:2")
    assert [b"validation/loss" in event for event in events] == [False, False, False, True, True], "NaN is no point"
    assert struct.unpack("<f", events[4][-4:]) == (2.5,)
    last = events[2]
    assert struct.unpack("<d", last[1:9]) == (12.5,)
    assert last[9:12] == b"\x10\xac\x02", "300 as a varint"
    assert b"train/loss" in last
    assert struct.unpack("<f", last[-4:]) == (1.5,)


def read_records(data: bytes) -> list[bytes]:
    found, offset = [], 0
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        body = data[offset + 12 : offset + 12 + length]
        assert record(body) == data[offset : offset + 16 + length]
        found.append(body)
        offset += 16 + length
    return found


def test_summary_counts_all_attempts(start: Start) -> None:
    run = start("--steps", "3")
    wait_for(run, Phase.FINISHED)
    state = json.loads(run.state_file.read_text())
    write_json(run.state_file, state | {"earlier_seconds": 1000.0, "energy_joules": 7.2e6, "peak_gpu_bytes": 2**30})
    write_notes(run, Notes(("a",), "b"))
    row = summarize(run, merge_resumes(np.empty((0, len(COLUMNS)))))
    assert row.elapsed_seconds is not None
    assert row.elapsed_seconds > 1000
    assert (row.energy_kwh, row.peak_memory_bytes, row.notes.tags) == (2.0, 2**30, ("a",))
    assert read_status(run).earlier_seconds == 1000


def test_sampler_counts_energy_and_peak_of_its_own_gpus(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path / "gpu.jsonl", tmp_path, gpus=["mine"])
    cards = [
        {"index": 0, "uuid": "mine", "power_watts": 300.0, "memory_used_bytes": 5},
        {"index": 1, "uuid": "other", "power_watts": 999.0, "memory_used_bytes": 9},
    ]
    sampler._count(cards, 2.0)
    sampler._count([cards[0] | {"power_watts": None, "memory_used_bytes": None}], 2.0)
    assert (sampler.energy_joules, sampler.peak_gpu_bytes) == (600.0, 5)


def test_utilisation_formula() -> None:
    shape = shape_of({"num_hidden_layers": 24, "hidden_size": 2048}, 1_889_110_016)
    assert shape == Shape(1_889_110_016, 24, 2048)
    assert shape_of({}, 5) is None
    full, lora = (flops_per_token(shape, 1024, is_full=is_full) for is_full in (True, False))
    assert full == 6 * 1_889_110_016 + 12 * 24 * 2048 * 1024
    assert lora == 4 * 1_889_110_016 + 12 * 24 * 2048 * 1024
    assert mfu(1000, 312e9, ["NVIDIA A100-SXM4-80GB"]) == pytest.approx(1.0)
    assert mfu(1000, 312e9, ["NVIDIA A100-SXM4-80GB", "Unknown"]) is None
    assert mfu(1000, 312e9, []) is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4), ("NVIDIA L40S", 362),
     ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165.2), ("Tesla T4", 65), ("NVIDIA A10G", 70),
     ("NVIDIA A10", 125), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GH200 480GB", 989.4),
     ("NVIDIA H100 NVL", 835), ("NVIDIA RTX A4000", None), ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312)],
)  # fmt: skip
def test_peak_by_name(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)
