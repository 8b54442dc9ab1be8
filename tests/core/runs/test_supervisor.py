"""The supervisor with the echo trainer: how runs start, end and are ended."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from core.errors import ConflictError, MachineError
from core.project import Project
from core.runs import processes, stop
from core.runs.control import request_stop
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import now_utc, start_job, start_supervisor
from core.runs.state import Phase, read_status
from tests.core.runs.conftest import Start, is_alive, log_of, wait_for, wait_for_step, wait_until


def test_finishes_with_log_and_metrics(start: Start) -> None:
    run = start("--steps", "3")
    status = wait_for(run, Phase.FINISHED)
    assert status.exit_code == 0
    assert status.ended_at is not None
    assert status.started_at is not None
    assert status.ended_at >= status.started_at
    assert log_of(run).count("step ") == 3
    assert len(run.metrics_file.read_text().splitlines()) == 3


def test_fails_with_exit_code(start: Start) -> None:
    run = start("--exit-code", "7", "--print", "boom")
    status = wait_for(run, Phase.FAILED)
    assert (status.exit_code, status.signal) == (7, None)
    assert "boom" in log_of(run)


def test_killed_process_tells_the_signal(start: Start) -> None:
    status = wait_for(start("--kill-self"), Phase.FAILED)
    assert (status.exit_code, status.signal) == (None, signal.SIGKILL)


def test_command_that_does_not_exist(start: Start) -> None:
    run = start(argv=["/no/such/python", "-V"])
    assert wait_for(run, Phase.FAILED).exit_code == 127
    assert "/no/such/python" in log_of(run)


def test_stop_save_lets_the_trainer_save(start: Start) -> None:
    run = start("--steps", "100000")
    wait_for_step(run)
    request_stop(run, "save")
    status = wait_for(run, Phase.STOPPED)
    assert status.exit_code == 0
    assert list(run.path.glob("iter_*.pth"))


def test_stop_save_ends_in_sigterm_when_ignored(start: Start) -> None:
    run = start("--steps", "100000", "--ignore-stop", stop_seconds=0.3)
    wait_for_step(run)
    request_stop(run, "save")
    assert wait_for(run, Phase.CANCELLED).signal == signal.SIGTERM


def test_cancel_is_sigterm_at_once(start: Start) -> None:
    run = start("--steps", "100000", stop_seconds=600)
    wait_for_step(run)
    request_stop(run, "cancel")
    status = wait_for(run, Phase.CANCELLED)
    assert status.stop_mode == "cancel"
    with pytest.raises(ConflictError, match="not_running"):
        request_stop(run, "save")


def test_save_can_become_cancel(start: Start) -> None:
    run = start("--steps", "100000", "--ignore-stop", stop_seconds=600)
    wait_for_step(run)
    request_stop(run, "save")
    wait_for(run, Phase.STOPPING)
    request_stop(run, "cancel")
    wait_for(run, Phase.CANCELLED)


def test_sigkill_when_sigterm_is_ignored(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stop.KILL_SECONDS == 15.0
    run = start("--steps", "100000", "--ignore-term", "--ignore-stop")
    wait_for_step(run)
    request_stop(run, "cancel")
    assert wait_for(run, Phase.CANCELLED).signal == signal.SIGKILL


def test_sigterm_to_the_supervisor_cancels(start: Start) -> None:
    run = start("--steps", "100000")
    status = wait_for_step(run)
    assert status.supervisor_pid is not None
    os.kill(status.supervisor_pid, signal.SIGTERM)
    assert wait_for(run, Phase.CANCELLED).phase is Phase.CANCELLED


def test_children_in_other_sessions_do_not_stay(start: Start) -> None:
    run = start("--orphan", "--steps", "2")
    wait_for(run, Phase.FINISHED)
    assert not is_alive(int((run.path / "orphan.pid").read_text()))


def test_cancel_reaches_children_in_other_sessions(start: Start) -> None:
    run = start("--orphan", "--steps", "100000")
    wait_for_step(run)
    request_stop(run, "cancel")
    wait_for(run, Phase.CANCELLED)
    assert not is_alive(int((run.path / "orphan.pid").read_text()))
    assert processes.marked(str(run.path)) == []


def test_supervisor_is_no_child_and_has_its_own_session(start: Start) -> None:
    run = start("--steps", "100000")
    pid = read_status(run).supervisor_pid
    assert pid is not None
    stat = processes.read_stat(pid)
    assert stat is not None
    assert stat.parent != os.getpid()
    assert stat.session != os.getsid(0)


def test_supervisor_uses_less_than_40_mb(start: Start) -> None:
    run = start("--steps", "100000")
    wait_until(run.gpu_file.exists)
    pid = read_status(run).supervisor_pid
    rss = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    assert int(rss.split()[1]) < 40 * 1024


def test_supervisor_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, core.runs.supervisor; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pandas", "pydantic", "streamlit", "psutil"} & set(modules)


def test_samples_the_machine_while_running(start: Start) -> None:
    run = start("--steps", "100000")
    wait_until(lambda: run.gpu_file.exists() and run.gpu_file.read_text().count("\n") >= 2)
    sample = json.loads(run.gpu_file.read_text().splitlines()[0])
    assert sample["ram_total_bytes"] > sample["ram_used_bytes"] > 0
    assert sample["run_ram_bytes"] > 0
    assert 0 <= sample["cpu_percent"] <= 100


def test_killed_supervisor_is_told_apart_and_stop_still_works(start: Start) -> None:
    run = start("--steps", "100000", "--ignore-stop", stop_seconds=0.3)
    pid = wait_for_step(run).supervisor_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))
    status = read_status(run)
    assert (status.phase, status.is_supervised) == (Phase.RUNNING, False)
    assert status.pid is not None
    request_stop(run, "save")
    assert wait_for(run, Phase.CANCELLED).phase is Phase.CANCELLED
    assert not is_alive(status.pid)


def test_killed_supervisor_and_killed_process_are_lost(start: Start) -> None:
    run = start("--steps", "100000")
    status = wait_for_step(run)
    assert status.supervisor_pid is not None
    assert status.pid is not None
    os.kill(status.supervisor_pid, signal.SIGKILL)
    os.kill(status.pid, signal.SIGKILL)
    wait_for(run, Phase.LOST)


def test_deleted_state_file_is_survived(start: Start) -> None:
    run = start("--steps", "100000")
    wait_for_step(run)
    run.state_file.unlink()
    status = read_status(run)
    assert status.phase is Phase.RUNNING
    assert status.supervisor_pid is not None
    request_stop(run, "save")
    wait_for(run, Phase.STOPPED)


def test_broken_spec_raises_before_anything_starts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.spec_file.write_text("{", encoding="utf-8")
    with pytest.raises(MachineError, match="no_supervisor"):
        start_supervisor(run)


def test_job_function_returns_result(project: Project) -> None:
    run = start_job(project, "tests_are_not_core:x", kind="copy", title="x", arguments={})
    assert wait_for(run, Phase.FAILED).exit_code == 1
    assert "not a function of core" in log_of(run)


def test_spec_survives_the_way_through_json() -> None:
    spec = RunSpec(id="a", kind="train", title="t", argv=["/x"], cwd="/", created_at=now_utc(), gpus=["0"])
    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json())) | {"unknown": 1}) == spec
