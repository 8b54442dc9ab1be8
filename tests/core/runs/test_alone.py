"""Two tabs or servers that start the same run at the same moment: one of them does, the other is told."""

import errno
import fcntl
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from core.checkpoints.inspect import CheckpointCard
from core.errors import ConflictError, MachineError
from core.project import Project
from core.runs import processes
from core.runs.again import go_on, retry
from core.runs.alone import alone
from core.runs.control import request_stop
from core.runs.directory import RunDirectory
from core.runs.state import SUPERVISOR_MODULE, Phase, read_attempt
from tests.core.runs.conftest import Start, save_checkpoint, wait_for

TABS = 4
CLAIM = ".go_on.claim"


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system keeps locks; both kinds are tried."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    return bool(request.param == "locks")


def test_of_several_tabs_one_makes_a_run_go_on(start: Start, locks: bool) -> None:
    del locks
    run = start("--steps", "100000", "--hold-at", "5")
    request_stop(run, "save")
    wait_for(run, Phase.STOPPED)
    save_checkpoint(run, 5)
    together = threading.Barrier(TABS)

    def press(_: int) -> CheckpointCard | ConflictError:
        together.wait()
        try:
            return go_on(run)
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(TABS) as tabs:
        answers = list(tabs.map(press, range(TABS)))
    refused = [answer for answer in answers if isinstance(answer, ConflictError)]
    assert len(refused) == TABS - 1
    assert {error.code for error in refused} <= {"runs.already_started", "runs.still_running"}
    assert read_attempt(run)["number"] == 2
    commands = [processes.command_line(stat.pid) for stat in processes.all_processes()]
    assert sum(str(run.path) in command and SUPERVISOR_MODULE in command for command in commands) == 1
    assert not (run.path / CLAIM).exists()


def test_who_comes_before_the_supervisor_stands_is_told(
    start: Start, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    del locks
    run = start("--exit-code", "1")
    wait_for(run, Phase.FAILED)
    save_checkpoint(run, 5)
    begun, may_end = threading.Event(), threading.Event()

    def begin(_run: RunDirectory) -> None:
        begun.set()
        may_end.wait()

    monkeypatch.setattr("core.runs.again.start_supervisor", begin)
    with ThreadPoolExecutor(1) as other_tab:
        first = other_tab.submit(go_on, run)
        begun.wait()
        written = run.attempt_file.read_bytes()
        try:
            with pytest.raises(ConflictError, match="already_started"):
                go_on(run)
        finally:
            may_end.set()
        assert first.result().iteration == 5
    assert run.attempt_file.read_bytes() == written


def test_a_claim_of_a_dead_process_is_in_nobodys_way(tmp_path: Path, locks: bool) -> None:
    run = RunDirectory(tmp_path)
    me = processes.identify(os.getpid())
    assert me is not None
    gone = replace(me, started_ticks=me.started_ticks + 1)
    (run.path / CLAIM).write_text(json.dumps(gone.to_json()), encoding="ascii")
    with alone(run, run.go_on_lock):
        assert locks or json.loads((run.path / CLAIM).read_text(encoding="ascii")) == me.to_json()
    with pytest.raises(ZeroDivisionError), alone(run, run.go_on_lock):
        raise ZeroDivisionError
    with alone(run, run.go_on_lock):  # given back, whatever happened
        pass


def test_a_claim_that_is_being_written_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunDirectory(tmp_path)
    (run.path / CLAIM).touch()
    with pytest.raises(ConflictError, match="already_started"), alone(run, run.go_on_lock):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(MachineError, match="cannot_write"), alone(run, run.go_on_lock):
        pass


def test_tabs_that_start_it_once_more_get_folders_of_their_own(
    start: Start, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("--exit-code", "1")
    wait_for(run, Phase.FAILED)
    run.source.mkdir()
    together = threading.Barrier(TABS)
    monkeypatch.setattr("core.runs.again.launch", lambda parent, spec: RunDirectory(parent / spec.id))

    def press(_: int) -> Path:
        together.wait()
        return retry(project, run).path

    with ThreadPoolExecutor(TABS) as tabs:
        made = set(tabs.map(press, range(TABS)))
    assert len(made) == TABS
    assert all(path.is_dir() for path in made)
