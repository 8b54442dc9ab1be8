"""Status derived from files and processes; deleting and bringing back; a full disk."""

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from core.errors import ConflictError, InputError
from core.files import write_json
from core.project import Project
from core.runs import processes
from core.runs.control import delete, list_trash, request_stop, restore
from core.runs.directory import RunDirectory
from core.runs.jobs import active_runs, find_run, list_runs
from core.runs.metrics import MetricsReader
from core.runs.sampling import Sampler
from core.runs.state import Phase, RunStatus, read_status
from core.runs.state_writer import StateWriter
from core.runs.summary import summarize
from tests.core.runs.conftest import Start, wait_for, wait_until


def write_state(folder: Path, **changes: object) -> RunDirectory:
    """A run that is running in this very test process, but for `changes`."""
    folder.mkdir(parents=True, exist_ok=True)
    me = processes.identify(os.getpid())
    assert me is not None
    state = {"phase": "running", "supervisor": me.to_json(), "process": me.to_json(), "started_at": time.time()}
    run = RunDirectory(folder)
    run.spec_file.write_text("{}", encoding="utf-8")
    run.state_file.write_text(json.dumps(state | changes), encoding="utf-8")
    return run


def identity(**changes: object) -> dict[str, object]:
    me = processes.identify(os.getpid())
    assert me is not None
    return me.to_json() | changes


def test_running(tmp_path: Path) -> None:
    status = read_status(write_state(tmp_path / "run"))
    assert (status.phase, status.pid, status.is_supervised) == (Phase.RUNNING, os.getpid(), True)


def test_reused_pid_is_another_process(tmp_path: Path) -> None:
    other = identity(started_ticks=1)
    assert read_status(write_state(tmp_path / "run", supervisor=other, process=other)).phase is Phase.LOST


def test_reboot(tmp_path: Path) -> None:
    other = identity(boot_id="another boot")
    assert read_status(write_state(tmp_path / "run", supervisor=other, process=other)).phase is Phase.LOST


def test_supervisor_dead_process_alive(tmp_path: Path) -> None:
    status = read_status(write_state(tmp_path / "run", supervisor=identity(started_ticks=1)))
    assert (status.phase, status.is_supervised) == (Phase.RUNNING, False)


@pytest.mark.parametrize("content", ["", '{"phase": "runn', "[]", '{"phase": "dancing", "supervisor": {}}', "{}"])
def test_half_written_state(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.runs.state._START_SECONDS", 1800.0)
    run = write_state(tmp_path / "run")
    run.state_file.write_text(content, encoding="utf-8")
    assert read_status(run).phase is Phase.STARTING
    old = time.time() - 3600
    os.utime(run.spec_file, (old, old))
    assert read_status(run).phase is Phase.LOST


def test_a_run_that_ends_while_it_is_looked_at_is_not_lost(tmp_path: Path) -> None:
    """Its file was read, then it wrote its end and went, then its processes were looked at."""
    run = write_state(tmp_path / "run")

    def is_alive(_: processes.ProcessIdentity) -> bool:
        write_state(run.path, phase="finished", exit_code=0)
        return False

    assert read_status(run, is_alive).phase is Phase.FINISHED


def test_a_process_that_its_killed_supervisor_had_no_time_to_note(tmp_path: Path) -> None:
    dead = identity(started_ticks=1)
    run = write_state(tmp_path / "run", phase="starting", supervisor=dead, process=None)
    assert read_status(run).phase is Phase.LOST
    environment = {**os.environ, processes.RUN_VARIABLE: str(run.path)}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=environment) as process:
        wait_until(lambda: bool(processes.marked(str(run.path))))
        status = read_status(run)
    assert (status.phase, status.pid, status.is_supervised) == (Phase.RUNNING, process.pid, False)


def test_deleted_directory(tmp_path: Path) -> None:
    assert read_status(RunDirectory(tmp_path / "gone")).phase is Phase.LOST


def test_full_disk_does_not_stop_the_state(tmp_path: Path) -> None:
    is_full = False

    def replace(path: Path, content: bytes) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    file = tmp_path / "state.json"
    writer = StateWriter(file, replace)
    assert writer.write({"phase": "running"})
    is_full = True
    assert writer.write({"phase": "finished"})
    assert json.loads(file.read_text())["phase"] == "finished"


def test_deleted_folder_is_not_made_anew(tmp_path: Path) -> None:
    assert StateWriter(tmp_path / "gone" / "state.json").write({"phase": "running"}) is False
    assert not (tmp_path / "gone").exists()


def test_gpu_file_is_bounded(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path / "gpu.jsonl", tmp_path, max_bytes=2000)
    for number in range(1000):
        sampler.append({"at": number, "gpus": []})
    assert (tmp_path / "gpu.jsonl").stat().st_size <= 2100
    assert json.loads((tmp_path / "gpu.jsonl").read_text().splitlines()[-1])["at"] == 999


def test_delete_and_undo(start: Start, project: Project) -> None:
    run = start("--steps", "2")
    wait_for(run, Phase.FINISHED)
    entry = delete(project, run)
    assert not run.path.exists()
    assert list_runs(project) == []
    assert list_trash(project) == [entry]
    assert restore(entry) == run
    assert read_status(run).phase is Phase.FINISHED
    assert list_trash(project) == []


def test_undo_does_not_overwrite(start: Start, project: Project) -> None:
    run = start("--steps", "1")
    wait_for(run, Phase.FINISHED)
    entry = delete(project, run)
    run.path.mkdir()
    (run.path / "mine").touch()
    with pytest.raises(ConflictError, match="exists"):
        restore(entry)


def test_running_run_cannot_be_deleted(start: Start, project: Project) -> None:
    run = start("--steps", "100000")
    with pytest.raises(ConflictError, match="still_running"):
        delete(project, run)
    assert active_runs(project) == [run]


def test_work_dirs_made_by_hand_are_read_only(project: Project) -> None:
    for work_dir in (project.train, project.train / "mine", project.root / "train_deepspeed"):
        folder = work_dir / "20240406_203957" / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text('{"loss": 1, "step": 10}\n', encoding="utf-8")
    assert {run.path.name for run in list_runs(project)} == {"train", "mine", "train_deepspeed"}
    run = find_run(project, "mine")
    with pytest.raises(ConflictError, match="not_ours"):
        request_stop(run, "cancel")
    scalars = next(run.path.glob("*/vis_data/scalars.json"))
    os.utime(scalars, (1, 1))
    assert read_status(run).phase is Phase.FINISHED
    with pytest.raises(ConflictError, match="not_ours"):
        delete(project, run)
    with pytest.raises(InputError, match="unknown"):
        find_run(project, "nothing")


def test_summary(start: Start) -> None:
    run = start("--steps", "4")
    wait_for(run, Phase.FINISHED)
    summary = summarize(run, MetricsReader(run.metrics_file).refresh())
    assert (summary.iteration, summary.total_iterations, summary.title) == (4, 4, "echo")
    assert summary.loss == pytest.approx((3 + 1.5 + 1 + 0.75) / 4)
    assert summary.tokens_per_second == pytest.approx(128 / 0.02)


def test_a_clock_that_was_set_back_or_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time runs backwards on the page, and a file from the future is no sign of life."""
    monkeypatch.setattr("core.runs.state._START_SECONDS", 1800.0)
    monkeypatch.setattr("core.runs.state._QUIET_SECONDS", 1800.0)
    now = time.time()
    for started_at, elapsed in ((now + 3600, 0.0), (now - 60, 60.0)):
        status = RunStatus(Phase.RUNNING, started_at=started_at)
        assert status.elapsed_seconds(now) == pytest.approx(elapsed)
    assert RunStatus(Phase.FINISHED, started_at=now, ended_at=now - 3600).elapsed_seconds() == 0.0
    scalars = tmp_path / "20250101_000000" / "vis_data" / "scalars.json"
    scalars.parent.mkdir(parents=True)
    scalars.touch()
    run = RunDirectory(tmp_path)
    for shift, phase in ((0, Phase.RUNNING), (-3600, Phase.FINISHED), (3600, Phase.FINISHED)):
        os.utime(scalars, (now + shift, now + shift))
        assert read_status(run).phase is phase
    write_json(run.spec_file, {})
    for shift, phase in ((0, Phase.STARTING), (-3600, Phase.LOST), (3600, Phase.LOST)):
        os.utime(run.spec_file, (now + shift, now + shift))
        assert read_status(run).phase is phase
