"""Reading metrics: by bytes, with half lines, NaN, resumes; the fast and the careful parser agree."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from core.runs.columns import GrowingRows
from core.runs.directory import RunDirectory
from core.runs.metrics import COLUMNS, MetricsReader, merge_resumes, parse, read_since, read_work_dir


def line(iteration: int, **more: object) -> str:
    return json.dumps(dict.fromkeys(COLUMNS, 1.5) | {"iteration": iteration} | more) + "\n"


def test_reads_only_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(1) + line(2), encoding="utf-8")
    rows = GrowingRows(len(COLUMNS))
    offset, inode = read_since(file, 0, 0, rows)
    assert rows.view()[:, 0].tolist() == [1, 2]
    assert offset == file.stat().st_size
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(line(3))
    assert read_since(file, offset, inode, rows)[0] == file.stat().st_size
    assert rows.view()[:, 0].tolist() == [1, 2, 3]


def test_half_line_waits_for_its_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = line(2)
    file.write_text(line(1) + whole[:20], encoding="utf-8")
    reader = MetricsReader(file)
    assert len(reader.refresh()) == 1
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(whole[20:])
    assert reader.refresh()["iteration"].tolist() == [1, 2]


def test_missing_then_replaced_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    reader = MetricsReader(file)
    assert len(reader.refresh()) == 0
    file.write_text(line(1) + line(2) + line(3), encoding="utf-8")
    assert len(reader.refresh()) == 3
    file.write_text(line(9), encoding="utf-8")
    assert reader.refresh()["iteration"].tolist() == [9]


def test_nan_null_and_garbage() -> None:
    text = (
        line(1, loss=math.nan) + "garbage\n[1]\n" + line(2, grad_norm=None) + line(3, loss=math.inf) + '{"loss": 1}\n'
    )
    rows = parse(text.encode())
    assert rows[:, 0].tolist() == [1, 2, 3]
    loss = rows[:, COLUMNS.index("loss")]
    assert math.isnan(loss[0])
    assert math.isinf(loss[2])
    assert math.isnan(rows[1, COLUMNS.index("grad_norm")])


@pytest.mark.parametrize(
    "spoiler", ["", "garbage\n", '{"iteration": 7, "lo' + line(8), line(7, loss=math.inf), '{"iteration": 7}\n']
)
def test_fast_parser_agrees_with_the_careful_one(spoiler: str) -> None:
    random = np.random.default_rng(0)
    lines = [
        line(
            n,
            loss=float(random.normal()),
            lr=1e-5 / n,
            grad_norm=None if n % 3 else 2.0,
            memory_bytes=math.nan if n % 5 else 1,
        )
        for n in range(1, 1500)
    ]
    lines.insert(700, spoiler)
    block = "".join(lines).encode()
    slow = np.concatenate([parse(part + b"\n") for part in block.split(b"\n") if part])
    assert len(block) > 65536
    np.testing.assert_array_equal(parse(block), slow)


def test_resume_newest_wins() -> None:
    rows = np.full((7, len(COLUMNS)), np.nan)
    rows[:, 0] = [1, 2, 3, 4, 5, 3, 4]
    rows[:, COLUMNS.index("loss")] = [1, 2, 3, 4, 5, 30, 40]
    metrics = merge_resumes(rows)
    assert metrics["iteration"].tolist() == [1, 2, 3, 4]
    assert metrics["loss"].tolist() == [1, 2, 30, 40]
    assert metrics.resumed_at == (3,)


def test_work_dir_made_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "20240406_203957" / "vis_data"
    folder.mkdir(parents=True)
    row = {"lr": 1e-4, "data_time": 0.01, "loss": 1.25, "time": 0.5, "memory": 4096, "step": 10, "tokens_per_sec": 100}
    (folder / "scalars.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    metrics = read_work_dir(RunDirectory(tmp_path))
    assert metrics["iteration"].tolist() == [10]
    assert metrics["memory_bytes"].tolist() == [4096 * 2**20]
    assert metrics["step_seconds"].tolist() == [0.5]
    assert metrics["tokens"].tolist() == [50]
