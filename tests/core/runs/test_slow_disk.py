"""Runs and jobs on a disk that is slow, as a network share may be, and on one that keeps no locks. Time here is counted, not waited for."""

import errno
import fcntl
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import ConflictError, JobError
from core.files import read_json, write_json
from core.messages import message
from core.project import Project
from core.runs import processes, supervisor
from core.runs.directory import RunDirectory, RunSpec
from core.runs.job import Progress
from core.runs.jobs import list_jobs, list_runs
from core.runs.launch import launch, now_utc, start_supervisor
from core.runs.state import Phase, read_status
from core.runs.watch import Watch, read_alerts
from tests.core.runs.conftest import Start, log_of, wait_for, wait_for_step, wait_until
from tests.slow_disk import Clock, SlowDisk, calls_of, environment

SECONDS = 0.05
"""What each operation takes."""


def test_a_run_starts_stops_and_is_judged_as_on_any_disk(
    start: Start, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    for name, value in environment(project.root, SECONDS, disk).items():
        monkeypatch.setenv(name, value)
    run = start("--steps", "100000", "--hold-at", "2")
    wait_for_step(run)
    with pytest.raises(ConflictError):
        start_supervisor(run)  # its lock holds
    watching = read_status(run).supervisor_pid
    assert watching is not None
    processes.send([watching], signal.SIGKILL)
    wait_until(lambda: not read_status(run).is_supervised)
    assert read_status(run).phase is Phase.RUNNING, "nobody watches over it, but it lives"
    write_json(run.stop_file, {"mode": "save"})
    wait_for(run, Phase.LOST)  # the trainer is quicker than the supervisor that takes over
    start_supervisor(run, is_adopting=True)
    wait_for(run, Phase.STOPPED)
    assert "saved iter_2.pth" in log_of(run)
    assert not {alert.kind for alert in read_alerts(run)[0]} & {"stalled", "slow_start"}
    assert "Traceback" not in (run.path / "supervisor.log").read_text(encoding="utf-8")
    written = Counter(Path(path).name for name, path in calls_of("supervisor.py", disk) if name in ("fsync", "replace"))
    assert set(written) == {".state.json.new"}, "the trainer's files are left alone"
    assert written[".state.json.new"] <= 2 * 7, "written when something happens, not while time passes"


def test_a_job_does_not_spend_its_time_on_its_progress(tmp_path: Path) -> None:
    clock = Clock()
    progress = Progress(RunDirectory(tmp_path), now=clock)
    with SlowDisk(tmp_path, SECONDS, clock.sleep) as disk:
        for number in range(10_000):
            clock.sleep(0.01)
            progress.update(number, 10_000, message("models.copying"))
    assert disk.count * SECONDS < 0.2 * clock.seconds
    (tmp_path / "stop.request").touch()
    clock.sleep(5)
    with pytest.raises(JobError):
        progress.check()


def test_a_clock_that_is_set_back_does_not_silence_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, run = Clock(), RunDirectory(tmp_path)
    progress = Progress(run, now=clock)
    for number, hour in enumerate((20, 10, 11)):
        monkeypatch.setattr("core.runs.job.time", SimpleNamespace(time=lambda hour=hour: 3600.0 * hour))
        progress.update(number, 10, message("models.copying"))
        assert read_json(run.progress_file)["done"] == number
        clock.sleep(1)


def test_space_is_looked_at_without_counting_a_checkpoint_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.runs.watch.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("core.runs.watch._SPACE_SECONDS", -1.0)
    run = RunDirectory(tmp_path)
    for number in (2, 10):
        (tmp_path / f"iter_{number}.pth").mkdir()
        for rank in range(30):
            (tmp_path / f"iter_{number}.pth" / f"rank_{rank}.pt").write_bytes(bytes(number))
    watch = Watch(run, RunSpec(id="r", kind="train", title="t", argv=["/x"], cwd="/", created_at=now_utc()), None)
    with SlowDisk(tmp_path) as first:
        watch.look()
    assert any(path == "iter_10.pth/rank_0.pt" for _, path in first.calls)
    assert not any(path.startswith("iter_2.pth") for _, path in first.calls), (
        "the newest says how large the next will be"
    )
    with SlowDisk(tmp_path) as later:
        watch.look()
    assert not any("rank_" in path for _, path in later.calls)
    assert later.count <= 8


def test_a_list_costs_one_look_a_run(project: Project) -> None:
    for number in range(20):
        for parent, kind in ((project.train, "train"), (project.jobs, "merge")):
            folder = parent / f"{kind}_{number}"
            folder.mkdir(parents=True)
            spec = RunSpec(id=folder.name, kind=kind, title="", argv=["/x"], cwd="/", created_at=now_utc())
            (folder / "run.json").write_text(str(spec.to_json()).replace("'", '"'), encoding="utf-8")
    with SlowDisk(project.root) as disk:
        assert len(list_runs(project)) == 20
    assert disk.count <= 20 + 10
    list_jobs(project, ("merge",))
    with SlowDisk(project.root) as disk:
        assert len(list_jobs(project, ("merge",))) == 20
        assert list_jobs(project, ("copy",)) == []
    assert disk.count <= 2 * (20 + 2)


def test_where_no_locks_are_kept_a_run_starts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("core.runs.launch.start_supervisor", lambda _run: None)
    spec = RunSpec(id="once", kind="train", title="", argv=["/x"], cwd="/", created_at=now_utc())
    run = launch(tmp_path, spec)
    assert supervisor._is_alone(run)
    with pytest.raises(ConflictError):
        launch(tmp_path, spec)
