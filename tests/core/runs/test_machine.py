"""Samples of the machine as columns: the fast and the careful parser agree; what is odd is passed over."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.runs.machine import GPU_FIELDS, MACHINE_FIELDS, MachineReader, MachineSeries, energy_kwh


def line(at: float, gpus: int = 2, **more: Any) -> str:
    cards = [{"index": n, "uuid": f"GPU-{n}", **dict.fromkeys(GPU_FIELDS, 10 * n + 1.5)} for n in range(gpus)]
    return json.dumps({"at": at, "gpus": cards, **dict.fromkeys(MACHINE_FIELDS, 2.5), **more}) + "\n"


def test_reads_gpus_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    reader = MachineReader(file)
    assert len(reader.refresh()) == 0
    file.write_text(line(1) + line(2, power_watts=1)[:30], encoding="utf-8")
    assert reader.refresh().at.tolist() == [1]
    file.write_text(line(1) + line(2) + line(3, gpus=1) + line(4, gpus=0), encoding="utf-8")
    series = reader.refresh()
    assert series.at.tolist() == [1, 2, 3, 4]
    assert series.machine["cpu_percent"].tolist() == [2.5] * 4
    assert series.gpus["GPU 0"]["at"].tolist() == [1, 2, 3]
    assert series.gpus["GPU 1"]["power_watts"].tolist() == [11.5, 11.5]


def test_only_new_lines_and_a_thinned_file(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    file.write_text("".join(line(at) for at in range(10)), encoding="utf-8")
    reader = MachineReader(file)
    first = reader.refresh()
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(line(10))
    assert len(reader.refresh()) == 11
    assert first.at.tolist() == list(range(10)), "what was handed out does not change"
    thinned = tmp_path / "new"
    thinned.write_text("".join(line(at) for at in range(0, 20, 2)), encoding="utf-8")
    thinned.replace(file)
    assert reader.refresh().at.tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize(
    "spoiler", ["", "garbage\n", "[]\n", '{"at": null}\n', '{"gpus": 3, "at": 7}\n', '{"at": 5}\n', "\n"]
)
def test_fast_parser_agrees_with_the_careful_one(tmp_path: Path, spoiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    lines = [
        line(at, gpus=int(random.integers(0, 4)), cpu_percent=None if at % 3 else float(random.normal()))
        for at in range(1500)
    ]
    lines.insert(700, spoiler)
    file = tmp_path / "gpu.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    assert file.stat().st_size > 2**19
    fast = MachineReader(file).refresh()
    monkeypatch.setattr("core.runs.machine._FAST_FROM_BYTES", 2**60)
    slow = MachineReader(file).refresh()
    np.testing.assert_array_equal(fast.at, slow.at)
    for name in MACHINE_FIELDS:
        np.testing.assert_array_equal(fast.machine[name], slow.machine[name])
    assert list(fast.gpus) == list(slow.gpus)
    for gpu, columns in slow.gpus.items():
        for name, values in columns.items():
            np.testing.assert_array_equal(fast.gpus[gpu][name], values)


def test_energy_is_power_over_time_without_gaps() -> None:
    at = np.array([0.0, 10, 20, 30, 10_000, 10_010, 10_005])
    watts = np.array([360.0, 360, 360, math.nan, 360, 360, 360])
    series = MachineSeries(at, {}, {"GPU 0": {"at": at, "power_watts": watts}})
    assert energy_kwh(series, "GPU 0") == pytest.approx(360 * 30 / 3.6e6)
    assert energy_kwh(series, "GPU 9") == 0
