"""Runs of the echo trainer, in a project of their own."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.files import write_json
from core.project import Project, open_project
from core.runs import processes
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, new_id, now_utc
from core.runs.state import Phase, RunStatus, read_status
from core.runs.watch import WatchRules

TRAINER = Path(__file__).with_name("echo_trainer.py")
Start = Callable[..., RunDirectory]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    return open_project(root)


@pytest.fixture
def start(project: Project) -> Iterator[Start]:
    """Launch the echo trainer with these arguments; whatever is left of it dies with the test."""
    runs: list[RunDirectory] = []

    def begin(
        *arguments: str,
        stop_seconds: float = 600.0,
        argv: list[str] | None = None,
        gpus: tuple[str, ...] = (),
        kind: str = "train",
        rules: WatchRules | None = None,
    ) -> RunDirectory:
        run = RunDirectory(project.train / new_id("train", project.train))
        runs.append(run)
        run.path.mkdir()
        if rules is not None:
            write_json(run.watch_file, rules.to_json())
        return launch(
            project.train,
            RunSpec(
                id=run.id,
                kind=kind,
                gpus=list(gpus),
                title="echo",
                argv=argv or [sys.executable, str(TRAINER), str(run.path), *arguments],
                cwd=str(project.root),
                created_at=now_utc(),
                stop_seconds=stop_seconds,
            ),
        )

    yield begin
    supervisors = [read_status(run).supervisor_pid for run in runs]
    processes.send([pid for pid in supervisors if pid is not None], signal.SIGKILL)  # first: they start who waits
    for run in runs:
        processes.send([stat.pid for stat in processes.marked(str(run.path))], signal.SIGKILL)


def wait_for(run: RunDirectory, *phases: Phase, timeout_seconds: float = 240.0) -> RunStatus:
    """The status of `run` once it is in one of `phases`. The limit is for what hangs, not for what is slow."""
    deadline = time.monotonic() + timeout_seconds
    while (status := read_status(run)).phase not in phases:
        assert time.monotonic() < deadline, f"{status} after {timeout_seconds} s; {log_of(run)}"
        time.sleep(0.02)
    return status


def wait_for_step(run: RunDirectory) -> RunStatus:
    """The status of `run` once the trainer has made a step and the supervisor has noted its process: either may be first."""
    wait_until(run.metrics_file.exists)
    return wait_for(run, Phase.RUNNING)


def wait_until(is_true: Callable[[], bool], timeout_seconds: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def save_checkpoint(run: RunDirectory, iteration: int) -> Path:
    """A file that inspect_checkpoint takes for one of mmengine's."""
    import torch

    path = run.path / f"iter_{iteration}.pth"
    state = {"meta": {"iter": iteration}, "state_dict": {"llm.x": torch.zeros(2)}, "optimizer": {"state": {}}}
    torch.save(state, path)
    return path


def log_of(run: RunDirectory) -> str:
    return run.log_file.read_text(encoding="utf-8") if run.log_file.exists() else ""


def is_alive(pid: int) -> bool:
    stat = processes.read_stat(pid)
    return stat is not None and not stat.is_zombie
