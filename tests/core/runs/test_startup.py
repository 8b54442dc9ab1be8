"""Where the start-up's time goes: phases that add up, and packages that a run does not use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core.runs.startup import PHASES, Clock, read_startup

ROOT = Path(__file__).parents[3]


class Now:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def break_after(self, seconds: float) -> None:
        self.seconds += seconds
        raise ValueError("broken")


def test_spans_are_counted_once_and_all_adds_up(tmp_path: Path) -> None:
    now = Now()
    clock = Clock(now)
    now.seconds += 3
    clock.until("imports")
    now.seconds += 1
    with clock.span("model"):
        now.seconds += 5
        with clock.span("data"):  # within another: it belongs to that
            now.seconds += 2
    with pytest.raises(ValueError, match="broken"), clock.span("data"):
        now.break_after(4)
    clock.until("setup")
    now.seconds += 0.5
    clock.until("first_step")
    assert clock.seconds == {"imports": 3, "model": 7, "data": 4, "setup": 1, "first_step": 0.5}
    clock.write(tmp_path)
    startup = read_startup(tmp_path, clock.began_at - 0.25)
    assert startup is not None
    assert list(startup.seconds) == [name for name in PHASES if name not in ("config", "answers")]
    assert startup.total_seconds == pytest.approx(15.75, abs=0.01)


def test_a_clock_that_was_set_back_leaves_the_process_out(tmp_path: Path) -> None:
    (tmp_path / "startup.json").write_text(json.dumps({"began_at": 50.0, "seconds": {"imports": 1}}))
    for started_at in (60.0, None):
        startup = read_startup(tmp_path, started_at)
        assert startup is not None
        assert startup.seconds == {"imports": 1}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"began_at": 1}', '{"began_at": "x", "seconds": {"imports": 1}}'])
def test_what_is_no_startup_is_none(tmp_path: Path, text: str) -> None:
    assert read_startup(tmp_path, 1.0) is None
    (tmp_path / "startup.json").write_text(text)
    assert read_startup(tmp_path, 1.0) is None


def left_out(model: Path, source: str, *, has_deepspeed: bool = False) -> set[str]:
    """In a process of its own, as it would be in the trainer: the names, each of which then cannot be imported or found."""
    code = f"""
import importlib.util, json
from pathlib import Path
from core.xtuner.runtime.startup import leave_out
names = leave_out({source!r}, Path({str(model)!r}), has_deepspeed={has_deepspeed})
assert all(importlib.util.find_spec(name) is None for name in names)
print(json.dumps(names))
"""
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    return set(json.loads(told.stdout))


@pytest.mark.engine
def test_bitsandbytes_comes_without_the_compiler_which_stays_what_it_was() -> None:
    code = """
import sys, torch
from core.xtuner.runtime.startup import import_bitsandbytes
kept = torch.compile
import_bitsandbytes()
assert torch.compile is kept
print("bitsandbytes" in sys.modules, "torch._inductor.lowering" in sys.modules)
sys.modules["bitsandbytes"] = None
import_bitsandbytes()
assert torch.compile is kept
"""
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    assert told.stdout.split() == ["True", "False"]


def test_packages_that_a_run_uses_are_not_left_out(tmp_path: Path) -> None:
    both = {"deepspeed", "bitsandbytes"}
    (tmp_path / "config.json").write_text("{}")
    assert left_out(tmp_path, "optimizer = AdamW") == both
    assert left_out(tmp_path, "quantization_config=dict(type=BitsAndBytesConfig)", has_deepspeed=True) == set()
    (tmp_path / "modeling.py").write_text("import bitsandbytes")
    assert left_out(tmp_path, "optimizer = AdamW") == {"deepspeed"}
    (tmp_path / "modeling.py").unlink()
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    assert left_out(tmp_path, "optimizer = AdamW") == {"deepspeed"}
