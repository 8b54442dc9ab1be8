"""A child of a job: what it prints, how it ends, and that nothing of it is left when the job is cancelled."""

import sys
import time
from pathlib import Path

import pytest

from core.errors import JobError
from core.runs.child import follow

_PRINTS = r"""
import sys
sys.stdout.write("first\n\n\rLoading:   0%|     | 0/2 [00:00<?, ?it/s]\rLoading: 100%|#####| 2/2 [00:00<00:00, 9.0it/s]\n")
sys.stdout.write("\x1b[Asecond\nSmoothing: 3it [00:01, 2.1it/s]\nwithout an end")
sys.exit(7)
"""


def test_lines_are_passed_on_and_progress_bars_stay_out_of_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []
    code = follow([sys.executable, "-c", _PRINTS], heard.append, lambda: None, cwd=tmp_path)
    assert code == 7
    assert [line for line in heard if "[" not in line] == ["first", "second", "without an end"]
    assert sum("Loading" in line for line in heard) == 2
    assert capfd.readouterr().out.splitlines() == ["first", "second", "without an end"]


def test_a_cancelled_job_ends_its_child_and_what_that_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    script = f"(while :; do date > {alive}; sleep 0.05; done) & echo started; wait"

    def stop() -> None:
        if alive.exists():
            raise JobError("runs.cancelled")

    with pytest.raises(JobError):
        follow(["sh", "-c", script], lambda _line: None, stop, cwd=tmp_path)
    before = alive.stat().st_mtime_ns
    time.sleep(0.3)
    assert alive.stat().st_mtime_ns == before


def test_the_environment_is_the_one_given(tmp_path: Path) -> None:
    heard: list[str] = []
    follow(["/bin/sh", "-c", "echo $GIVEN-$HOME-"], heard.append, lambda: None, cwd=tmp_path, env={"GIVEN": "x"})
    assert heard == ["x--"]
