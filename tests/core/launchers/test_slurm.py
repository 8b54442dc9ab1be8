"""Runs on a real Slurm with two virtual nodes on this machine."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import DanluError, InputError, JobError
from core.launchers import slurm
from core.launchers.slurm import SlurmWish
from core.project import Project, open_project
from core.runs.control import request_stop
from core.runs.directory import RunDirectory, RunSpec
from core.runs.failure import explain_failure
from core.runs.launch import launch, now_utc
from core.runs.state import Phase, RunStatus, read_status
from tests.core.launchers import cluster
from tests.core.runs.test_resume import write_checkpoint
from tests.training import read_lines
from tests.waiting import has_stopped

TRAINER = Path(__file__).with_name("saving_trainer.py")
PATIENCE_SECONDS = 600.0
"""For what hangs, not for what is slow."""
LINE = (
    "JobId=7 JobName=a b UserId=root(0) JobState=PENDING Reason=Resources Requeue=1 Restarts=2 ExitCode=0:0 "
    "StartTime=2026-11-25T10:19:12 NodeList=(null) NumNodes=2"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with cluster.running(tmp_path_factory.mktemp("slurm") / "c") as file:
        yield file


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "p"
    root.mkdir()
    return open_project(root)


@pytest.fixture
def submit(project: Project, config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunDirectory]]:
    """Start the saving trainer as a run on the cluster; what is left of it is cancelled after the test."""
    monkeypatch.setenv("SLURM_CONF", str(config))
    runs: list[RunDirectory] = []

    def start(name: str, *, steps: int = 5, hold_at: int = 0, **wish: Any) -> RunDirectory:
        run = RunDirectory(project.train / name)
        run.path.mkdir()
        runs.append(run)
        write_checkpoint(run.path / "template.bin")
        chosen = SlurmWish(**{"has_gpus": False, "cpus_per_process": 1, "minutes": 60, **wish})
        text = slurm.wrap(
            chosen, [sys.executable, str(TRAINER), str(run.path), str(steps), "0.05", str(hold_at)],
            slurm.training_env_of_agent(), python=sys.executable, run_folder=run.path, root=project.root, name=name,
        )  # fmt: skip
        (run.path / slurm.BATCH_FILE).write_text(text, encoding="utf-8")
        command = slurm.command(sys.executable, run.path)
        return launch(
            project.train,
            RunSpec(
                id=name, kind="train", title=name, argv=command.argv, cwd=str(project.root), env=command.env,
                created_at=now_utc(), stop_seconds=PATIENCE_SECONDS, details={"launcher": "slurm"},
            ),
        )  # fmt: skip

    yield start
    for run in runs:
        if read_status(run).phase.is_active:
            request_stop(run, "cancel")
            assert has_stopped(run, PATIENCE_SECONDS)


def wait_for(run: RunDirectory, *phases: Phase) -> RunStatus:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (status := read_status(run)).phase not in phases:
        log = run.log_file.read_text(errors="replace") if run.log_file.exists() else ""
        assert time.monotonic() < deadline, f"{status}\n{log}"
        time.sleep(0.1)
    return status


def job_now(run: RunDirectory) -> dict[str, Any]:
    """What Slurm last said of the run's job."""
    file = run.path / slurm.JOB_FILE
    job: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return job


def job_of(run: RunDirectory, state: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        job = job_now(run)
        if job.get("state") == state and "restarts" in job:
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def iterations(run: RunDirectory) -> list[int]:
    return [line["iteration"] for line in read_lines(run.metrics_file)]


@pytest.mark.slurm
def test_a_run_on_two_nodes_is_like_any_other(submit: Callable[..., RunDirectory]) -> None:
    run = submit("two machines", nodes=2)
    assert wait_for(run, Phase.FINISHED).exit_code == 0
    log = run.log_file.read_text()
    assert "node 0 starts at 1" in log
    assert "node 1 starts at 1" in log
    assert iterations(run) == [1, 2, 3, 4, 5]
    assert json.loads((run.path / slurm.JOB_FILE).read_text())["nodes"] == "n[1-2]"


@pytest.mark.slurm
def test_waiting_place_reason_stop_and_cancel(submit: Callable[..., RunDirectory]) -> None:
    first = submit("first", nodes=2, steps=1_000_000, cpus_per_process=2)
    job_of(first, "RUNNING")
    second, third = submit("second", nodes=2), submit("third", nodes=2)
    waiting = [job_of(run, "PENDING") for run in (second, third)]
    assert {job["position"] for job in waiting} <= {1, 2}
    assert all(job["reason"] in ("Resources", "Priority", None) for job in waiting)
    request_stop(third, "save")
    assert wait_for(third, Phase.STOPPED, Phase.CANCELLED).phase is Phase.STOPPED, "it had nothing to save"
    request_stop(second, "cancel")
    wait_for(second, Phase.CANCELLED)
    request_stop(first, "save")
    assert wait_for(first, Phase.STOPPED).exit_code == 0
    assert list(first.path.glob("iter_*.pth"))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while shown := subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout.strip():
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)


@pytest.mark.slurm
def test_near_the_time_limit_it_saves_requeues_and_goes_on(submit: Callable[..., RunDirectory]) -> None:
    """Slurm counts minutes and signals up to one early: with 55 seconds before a limit of one minute that is soon."""
    run = submit("long", steps=12, hold_at=5, minutes=1, signal_seconds=55)
    deadline, may_start_at = time.monotonic() + PATIENCE_SECONDS, float("inf")
    while (status := read_status(run)).phase is not Phase.FINISHED:
        assert status.phase.is_active, run.log_file.read_text()
        assert time.monotonic() < deadline, run.log_file.read_text()
        job = job_now(run)
        if (job.get("state"), job.get("reason")) == ("PENDING", "BeginTime"):
            # Slurm holds a requeued job back for two minutes; nobody here wants to wait for that. But not in the second of its
            # end: the node takes a credential for revoked whose time, in whole seconds, is not later.
            may_start_at = min(may_start_at, time.monotonic() + 3)
            if time.monotonic() > may_start_at:
                subprocess.run(["scontrol", "update", f"JobId={job['id']}", "StartTime=now"], check=False)
        time.sleep(0.2)
    log = run.log_file.read_text()
    assert "the time limit is near, saving" in log
    assert "going on from" in log
    assert iterations(run) == list(range(1, 13)), "nothing done twice, nothing left out"
    assert json.loads((run.path / slurm.JOB_FILE).read_text())["restarts"] >= 1
    assert not (run.path / slurm.SAVE_REQUEST).exists()


@pytest.mark.slurm
def test_what_slurm_refuses_or_ends_is_explained(submit: Callable[..., RunDirectory]) -> None:
    refused = submit("refused", partition="nowhere")
    wait_for(refused, Phase.FAILED)
    assert json.loads(refused.error_file.read_text())["code"] == "slurm.refused"
    run = submit("outside", steps=1_000_000)
    job = job_of(run, "RUNNING")
    subprocess.run(["scancel", job["id"]], check=True)
    status = wait_for(run, Phase.FAILED)
    failure = explain_failure(run, status)
    assert failure is not None
    assert failure.what.key == "slurm.errors.cancelled_outside.what"


@pytest.mark.slurm
def test_partitions_and_availability(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(config))
    assert slurm.is_available()
    assert slurm.partitions() == ["main"]
    assert slurm.read_job("99999") is None
    with pytest.raises(JobError, match="refused"):
        slurm.submit(config)


def test_a_line_of_scontrol_is_read() -> None:
    job = slurm.parse_job(LINE)
    assert (job.id, job.state, job.reason, job.nodes, job.restarts) == ("7", "PENDING", "Resources", "", 2)
    assert job.is_pending
    assert not job.is_over
    with pytest.raises(InputError):
        slurm.parse_job("nothing")


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.is_available()
    with pytest.raises(DanluError, match="missing"):
        slurm.partitions()


def test_the_batch_file_starts_torchrun_on_each_node(tmp_path: Path) -> None:
    wish = SlurmWish(partition="gpu", account="lab", nodes=2, processes=4, minutes=60, setup="module load cuda")
    text = slurm.batch_text(wish, "/py", tmp_path / "it's run", tmp_path, name="x", is_local=True)
    for line in ("--partition=gpu", "--account=lab", "--nodes=2", "--gpus-per-node=4", "--time=60", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "module load cuda" in text
    assert "--nnodes 2 --node_rank $SLURM_NODEID --nproc_per_node 4" in text
    assert "CUDA_VISIBLE_DEVICES" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_job_that_was_started_again_goes_on_from_where_the_batch_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.xtuner.runtime.entry import resume_from

    run, details = RunDirectory(tmp_path), {"resume": "/first.pth"}
    assert resume_from(run, details) == "/first.pth"
    run.attempt_file.write_text('{"resume": "/second.pth"}')
    assert resume_from(run, details) == "/second.pth"
    text = slurm.batch_text(SlurmWish(), "/py", tmp_path, tmp_path, name="x", is_local=True)
    assert f'export {slurm.RESUME_VARIABLE}="$(/py -m core.launchers.newest' in text
    monkeypatch.setenv(slurm.RESUME_VARIABLE, "/third.pth")
    assert resume_from(run, details) == "/third.pth"
    monkeypatch.setenv(slurm.RESUME_VARIABLE, "")
    assert resume_from(run, details) == "/second.pth", "there was none yet: Slurm ended it before the first checkpoint"
