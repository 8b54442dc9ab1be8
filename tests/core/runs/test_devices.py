"""A device belongs to one run at a time; who waits starts by itself, in order; what is left by the dead blocks nobody."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from core.errors import ConflictError
from core.project import Project
from core.runs import processes
from core.runs.control import request_stop
from core.runs.devices import CPU, Claim, Holder, default_folder, holders, wanted
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, now_utc, start_supervisor
from core.runs.state import SUPERVISOR_MODULE, Phase, read_status
from tests.core.runs.conftest import TRAINER, Start, is_alive, wait_for, wait_for_step, wait_until


def claim(folder: Path, run: str, *devices: str) -> Claim:
    return Claim(Path(run), devices, folder)


def test_what_a_run_needs() -> None:
    spec = RunSpec(id="a", kind="train", title="t", argv=["/x"], cwd="/", created_at=now_utc(), gpus=["GPU-1", "GPU-1"])
    assert wanted(spec) == ["GPU-1"]
    assert wanted(RunSpec(id="a", kind="train", title="t", argv=["/x"], cwd="/", created_at=now_utc())) == [CPU]
    assert wanted(RunSpec(id="a", kind="copy", title="t", argv=["/x"], cwd="/", created_at=now_utc())) == []
    cluster = RunSpec(
        id="a", kind="train", title="t", argv=["/x"], cwd="/", created_at=now_utc(), details={"launcher": "slurm"}
    )
    assert wanted(cluster) == []


def test_one_holder_a_device(tmp_path: Path) -> None:
    first, second = claim(tmp_path, "/one", "GPU-1"), claim(tmp_path, "/two", "GPU-1")
    assert first.take()
    assert not second.take()
    assert second.waits_for == [Holder("GPU-1", "/one")]
    assert holders(tmp_path) == [Holder("GPU-1", "/one")]
    first.release()
    assert second.take()
    assert claim(tmp_path, "/three", "GPU-2").take()


def test_all_or_nothing_and_first_come_first_served(tmp_path: Path) -> None:
    one, both, late, other = (
        claim(tmp_path, "/one", "A"),
        claim(tmp_path, "/both", "A", "B"),
        claim(tmp_path, "/late", "B"),
        claim(tmp_path, "/other", "C"),
    )
    assert one.take()
    assert not both.take()
    assert not late.take(), "B is free, but a run that came earlier wants it"
    assert late.waits_for == [Holder("B", "/both")]
    assert other.take(), "C is wanted by nobody else"
    one.release()
    assert not late.take()
    assert both.take()
    both.release()
    assert late.take()


def test_leaving_the_queue_lets_the_next_one_in(tmp_path: Path) -> None:
    one, two, three = (claim(tmp_path, name, "A") for name in ("/one", "/two", "/three"))
    assert (one.take(), two.take(), three.take()) == (True, False, False)
    two.release()
    one.release()
    assert three.take()


def test_cpu_slots_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_CPU_SLOTS", "2")
    claims = [claim(tmp_path, f"/{number}", CPU) for number in range(3)]
    assert [each.take() for each in claims] == [True, True, False]
    claims[0].release()
    assert claims[2].take()


def test_tickets_and_locks_of_the_dead_block_nobody(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from core.runs.devices import Claim\n"
        "held = Claim(pathlib.Path('/dead'), ['A'], pathlib.Path(sys.argv[1])); assert held.take()\n"
        "waiting = Claim(pathlib.Path('/dead2'), ['A'], pathlib.Path(sys.argv[1])); assert not waiting.take()\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "queue").glob("*.json"))) == 1
    assert claim(tmp_path, "/alive", "A").take()
    assert list((tmp_path / "queue").glob("*.json")) == []


def test_a_clock_that_was_set_back_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tickets are in order of the clock: who comes after it was set back goes first, and the other one next."""
    now = time.time_ns()
    holder, first = claim(tmp_path, "/holder", "GPU-1"), claim(tmp_path, "/first", "GPU-1")
    assert holder.take()
    assert not first.take()
    monkeypatch.setattr("core.runs.devices.time.time_ns", lambda: now - 3600 * 10**9)
    second = claim(tmp_path, "/second", "GPU-1")
    assert not second.take()
    holder.release()
    assert not first.take()
    assert second.take()
    second.release()
    assert first.take()
    first.release()


def test_a_broken_ticket_is_removed(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "00000000000000000001_1.json").write_text("{half", encoding="utf-8")
    assert claim(tmp_path, "/run", "A").take()


def test_where_no_lock_can_be_kept_there_is_none_to_give_back(tmp_path: Path) -> None:
    (tmp_path / "no_folder").touch()
    refused = claim(tmp_path / "no_folder", "/run", "A")
    with pytest.raises(OSError, match="no_folder"):
        refused.take()
    refused.release()


def test_waiting_run_starts_by_itself(start: Start) -> None:
    first = start("--steps", "100000", gpus=("GPU-x",))
    wait_for(first, Phase.RUNNING)
    second = start("--steps", "2", gpus=("GPU-x",))
    status = read_status(second)
    assert status.phase is Phase.QUEUED
    assert status.waits_for == (Holder("GPU-x", str(first.path)),)
    assert (status.started_at, status.elapsed_seconds()) == (None, None)
    beside = start("--steps", "2", gpus=("GPU-y",))
    wait_for(beside, Phase.FINISHED)
    assert not second.log_file.exists()
    request_stop(first, "save")
    wait_for(second, Phase.FINISHED)
    assert holders() == [], "who says that it has ended has given back what it had"


def test_waiting_run_can_be_cancelled(start: Start) -> None:
    first = start("--steps", "100000")
    second = start("--steps", "2")
    wait_for(second, Phase.QUEUED)
    request_stop(second, "save")
    status = wait_for(second, Phase.CANCELLED)
    assert status.exit_code is None
    assert not second.log_file.exists()
    assert read_status(first).phase.is_active
    assert list((default_folder() / "queue").glob("*.json")) == []


def test_gpu_stays_taken_while_the_trainer_of_a_killed_supervisor_lives(start: Start) -> None:
    first = start("--steps", "100000", gpus=("GPU-x",))
    status = wait_for_step(first)
    assert status.supervisor_pid is not None
    assert status.pid is not None
    os.kill(status.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(status.supervisor_pid or 0))
    second = start("--steps", "2", gpus=("GPU-x",))
    assert read_status(second).phase is Phase.QUEUED
    start_supervisor(first, is_adopting=True)
    assert read_status(second).phase is Phase.QUEUED
    os.kill(status.pid, signal.SIGKILL)
    wait_for(second, Phase.FINISHED)


def test_two_servers_start_a_run_once(start: Start, project: Project) -> None:
    run = start("--steps", "100000")
    wait_for(run, Phase.RUNNING)
    with pytest.raises(ConflictError, match="already_started"):
        start_supervisor(run)
    with pytest.raises(ConflictError, match="already_started"):
        launch(project.train, run.spec())
    start_supervisor(run, is_adopting=True)  # asked for by two tabs: the second changes nothing
    commands = [processes.command_line(stat.pid) for stat in processes.all_processes()]
    assert sum(str(run.path) in command and SUPERVISOR_MODULE in command for command in commands) == 1
    assert sum(str(run.path) in command and str(TRAINER) in command for command in commands) == 1


def test_a_run_started_by_a_job_outlives_it(start: Start, project: Project, tmp_path: Path) -> None:
    go = tmp_path / "go"
    inner: dict[str, object] = {
        "id": "inner",
        "kind": "train",
        "title": "t",
        "cwd": "/",
        "created_at": now_utc(),
        "gpus": ["GPU-z"],
    }
    waits = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)"
    inner["argv"] = [sys.executable, "-c", waits, str(go)]
    code = (
        "import json, pathlib, sys; sys.path.insert(0, sys.argv[3])\n"
        "from core.runs.launch import launch; from core.runs.directory import RunDirectory, RunSpec\n"
        "launch(pathlib.Path(sys.argv[1]), RunSpec.from_json(json.loads(sys.argv[2])))"
    )
    root = str(Path(__file__).parents[3])
    job = start(argv=[sys.executable, "-c", code, str(project.train), json.dumps(inner), root], kind="reshape")
    wait_for(job, Phase.FINISHED, Phase.FAILED)
    go.touch()
    ended = (Phase.FINISHED, Phase.CANCELLED, Phase.FAILED, Phase.LOST)
    assert wait_for(RunDirectory(project.train / "inner"), *ended).phase is Phase.FINISHED


_TWO_SERVERS = """
import sys, time
from pathlib import Path
from core.errors import ConflictError
from core.project import Project
from core.runs.directory import RunSpec
from core.runs.launch import launch, now_utc, start_job
name, root, trainer, go = sys.argv[1:]
project = Project(Path(root))
print("ready", flush=True)
while not Path(go).exists():
    time.sleep(0.001)
for number in range(3):
    run = project.train / f"run_{number}"
    argv = [sys.executable, trainer, str(run), "--steps", "2"]
    try:
        launch(project.train, RunSpec(id=run.name, kind="train", title=name, argv=argv, cwd=root, created_at=now_utc()))
        print("started", run.name, flush=True)
    except ConflictError as error:
        assert error.code == "runs.already_started", error
    print("job", start_job(project, "core.files:tree_size_bytes", kind="copy", title=name, arguments={}).id, flush=True)
"""


def test_two_servers_share_one_queue(project: Project, tmp_path: Path) -> None:
    """Two processes start the same three runs at the same time: each runs once, as whoever started it said, one after the other."""
    go = tmp_path / "go"
    servers = {
        name: subprocess.Popen(
            [sys.executable, "-c", _TWO_SERVERS, name, str(project.root), str(TRAINER), str(go)],
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("first", "second")
    }
    for server in servers.values():
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
    go.touch()
    said = {name: server.communicate(timeout=600)[0].split() for name, server in servers.items()}
    assert [server.returncode for server in servers.values()] == [0, 0]
    runs = [RunDirectory(project.train / f"run_{number}") for number in range(3)]
    spans = []
    for run in runs:
        (starter,) = [name for name, words in said.items() if run.id in words]
        assert run.spec().title == starter
        status = wait_for(run, Phase.FINISHED)
        assert status.started_at is not None
        assert status.ended_at is not None
        spans.append((status.started_at, status.ended_at))
    for (_, end), (begin, _) in pairwise(sorted(spans)):
        assert begin >= end
    jobs = [word for words in said.values() for word in words if word.startswith("copy_")]
    assert len(set(jobs)) == 6
    for job in jobs:
        wait_for(RunDirectory(project.jobs / job), Phase.FINISHED, Phase.FAILED)
