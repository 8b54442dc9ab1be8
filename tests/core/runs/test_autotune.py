"""Which settings are worth measuring, what is remembered of them, what consent changes in a config; and one real measurement."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.config.source import ConfigSource
from core.errors import InputError, MachineError
from core.files import write_json
from core.project import Project
from core.runs import autotune
from core.runs.job import SilentProgress
from core.runs.speed_table import (
    Measured,
    Setting,
    apply,
    key_of,
    remember,
    remember_consent,
    remembered,
    setting_of,
)
from tests.models import write_tiny_internlm2, write_tiny_llama
from tests.training import make_project

STOCK = Setting(batch_size=1, accumulation=16, checkpointing=True, speed="off")


def walk(answers: Sequence[dict[str, Any] | None]) -> list[Setting]:
    """What is measured when the settings in turn give these results (None: it failed)."""
    rows: list[Measured] = []
    for setting, answer in zip(autotune._worth_measuring(STOCK, rows, length=1024), answers, strict=False):
        if answer is None:
            rows.append(Measured(setting=setting, tokens_per_second=None, failure="train.out_of_memory"))
        else:
            rows.append(Measured(setting=setting, **answer))
    return [row.setting for row in rows]


def test_with_the_fast_pass_other_sizes_of_it_are_tried() -> None:
    fast = {"tokens_per_second": 9.0, "parts": ("fast_pass", "unpacked_weights"), "tokens_per_pass": 4096}
    settings = walk([{"tokens_per_second": 1.0}, fast, fast, fast, fast, fast, fast])
    assert settings[:2] == [STOCK, replace(STOCK, speed="auto")]
    passes = [setting.speed["tokens_per_pass"] for setting in settings[2:5] if isinstance(setting.speed, dict)]
    assert passes == [2048, 8192, 16384]
    assert settings[5].speed == {"parts": ["fast_pass"]}
    assert len(settings) == 6


def test_without_it_micro_batches_grow_while_that_helps() -> None:
    rates = [1.0, 1.0, 2.0, 3.0, 2.5, 4.0]
    settings = walk([{"tokens_per_second": rate} for rate in rates])
    assert [(setting.batch_size, setting.accumulation) for setting in settings[2:5]] == [(2, 8), (4, 4), (8, 2)]
    assert settings[5] == Setting(batch_size=4, accumulation=4, checkpointing=False, speed="off")
    assert all(setting.batch_size * setting.accumulation == 16 for setting in settings)


def test_what_does_not_fit_ends_the_growth() -> None:
    settings = walk([{"tokens_per_second": 1.0}, None, {"tokens_per_second": 2.0}, None, {"tokens_per_second": 3.0}])
    assert [setting.batch_size for setting in settings] == [1, 1, 2, 4, 2]
    assert not settings[-1].checkpointing


@pytest.fixture
def place(tmp_path: Path) -> tuple[Project, Path]:
    return make_project(tmp_path / "p", write_tiny_llama, batch_size=1, accumulative_counts=8, save_steps=40)


def test_consent_keeps_the_meaning_of_the_config(place: tuple[Project, Path]) -> None:
    source = ConfigSource(place[1].read_text())
    now = setting_of(source)
    assert (now.batch_size, now.accumulation, now.speed) == (1, 8, "off")
    edited = apply(source, replace(now, batch_size=4, accumulation=2, checkpointing=not now.checkpointing))
    found = setting_of(edited)
    assert found == replace(now, batch_size=4, accumulation=2, checkpointing=not now.checkpointing)
    assert (edited.get("save_steps"), edited.get("evaluation_freq")) == (10, 25)
    assert edited.get("lr") == source.get("lr")
    assert apply(source, now).text == source.text
    assert apply(source, replace(now, speed="auto")).text == source.text


def test_a_table_is_remembered_for_its_model_card_length_and_method(place: tuple[Project, Path]) -> None:
    project, config = place
    source = ConfigSource(config.read_text())
    rows = [
        Measured(setting=STOCK, tokens_per_second=10.0),
        Measured(setting=replace(STOCK, speed="auto"), tokens_per_second=30.0, parts=("fast_pass",)),
        Measured(setting=replace(STOCK, batch_size=2), tokens_per_second=None, failure="train.out_of_memory"),
    ]
    assert remembered(project, source, gpu=None) is None
    value = {"rows": [row.to_json() for row in rows], "at": "2026-01-01T00:00:00+00:00", "applied": False}
    remember(project, key_of(project, source, card="CPU"), value)
    table = remembered(project, source, gpu=None)
    assert table is not None
    assert table.rows == tuple(rows)
    assert table.stock == rows[0]
    assert table.best == rows[1]
    assert not table.applied
    remember_consent(project, source, gpu=None)
    table = remembered(project, source, gpu=None)
    assert table is not None
    assert table.applied
    assert remembered(project, source.set("max_length", 128), gpu=None) is None
    assert remembered(project, source, gpu="GPU-other") is None
    (project.private / "speed.json").write_text("{", encoding="utf-8")
    assert remembered(project, source, gpu=None) is None


def test_a_model_that_is_not_here_cannot_be_measured(place: tuple[Project, Path]) -> None:
    project, config = place
    config.write_text(config.read_text().replace("/tiny", "/gone"))
    with pytest.raises(InputError, match="no_local_model"):
        autotune.start_autotune(project, config, gpu=None)


@pytest.mark.engine
def test_a_measurement_finds_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real trainer, a fraction of a second a setting: every setting trains, nothing is left behind."""
    monkeypatch.setattr(autotune, "_SETTING_SECONDS", 0.2)
    monkeypatch.setattr(autotune, "_MEASURED_SECONDS", 3600.0)
    monkeypatch.setattr(autotune, "_SETTING_LIMIT_SECONDS", 600.0)
    project, config = make_project(tmp_path / "p", write_tiny_internlm2)
    before = config.read_text()
    result = autotune.measure(str(project.root), str(config), None, autotune.sys.executable, SilentProgress())
    table = remembered(project, ConfigSource(before), gpu=None)
    assert table is not None
    assert [Measured.from_json(row) for row in result["rows"]] == list(table.rows)
    assert [row.failure for row in table.rows] == [None] * 3
    stock, fast, larger = table.rows
    assert (stock.parts, stock.tokens_per_pass) == ((), None)
    assert {"fast_pass", "block_attention"} <= set(fast.parts)
    assert (fast.tokens_per_pass, larger.tokens_per_pass) == (64, 128)
    assert all((row.tokens_per_second or 0) > 0 and row.measured_seconds >= 0.2 for row in table.rows)
    assert config.read_text() == before, "measuring changes nothing"
    assert not list((project.private / "trials").iterdir())


def test_a_setting_that_fails_says_why(tmp_path: Path) -> None:
    log = "Traceback\n[rank0]: torch.AcceleratorError: no kernel image\nfull of\nwork_dir='/x'\n"
    (tmp_path / "trial.log").write_text(log, encoding="utf-8")
    row = autotune._result(tmp_path, STOCK)
    assert (row.tokens_per_second, row.failure) == (None, "[rank0]: torch.AcceleratorError: no kernel image")
    write_json(tmp_path / "error.json", MachineError("train.out_of_memory").to_json())
    assert autotune._result(tmp_path, STOCK).failure == "train.out_of_memory"
    measured = {
        "tokens_per_second": 5.0,
        "memory_bytes": 7,
        "parts": [],
        "tokens_per_pass": None,
        "measured_seconds": 8.0,
    }
    write_json(tmp_path / "result.json", measured)
    assert autotune._result(tmp_path, STOCK).tokens_per_second == 5.0
