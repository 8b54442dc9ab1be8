"""kill -9 at random moments: of a rank, of torchrun, of the supervisor, inside a save. Every checkpoint that looks whole must be whole.

A run is killed, and the next goes on from what it left. Two such chains go side by side: while one waits for the end of what it
killed, the other starts.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.result import Result
from core.checkpoints.inspect import list_checkpoints, newest_complete
from core.launchers.newest import newest
from core.runs import processes
from core.runs.control import request_stop
from core.runs.devices import FOLDER_VARIABLE
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, now_utc
from core.runs.state import RunStatus, read_status
from core.xtuner.command import free_port, training_env

KILLS: Final = 50
MOST_LOST: Final = 4
"""Iterations: every second one is saved, and one save may still be written when the next is due."""
_CHAINS: Final = 2
VICTIMS: Final = ("rank 0", "rank 1", "torchrun", "supervisor", "rank in a save")
_TRAINER: Final = Path(__file__).parent / "training/saving_ranks.py"
_STEPS: Final = 100_000
_SECONDS: Final = 600.0
"""For what hangs; how long an end took is a figure of its own."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill and what it left."""

    victim: str
    started_at: int
    """Iteration at which the killed run began."""
    reached: int
    """Last iteration it wrote."""
    kept: int | None
    """Iteration of the newest checkpoint that looks whole."""
    broken: tuple[str, ...]
    """Checkpoints that look whole and are not."""
    end_seconds: float
    left_processes: int


def run() -> Result:
    with tempfile.TemporaryDirectory() as home:
        os.environ[FOLDER_VARIABLE] = str(Path(home) / "devices")
        with ThreadPoolExecutor(_CHAINS) as pool:
            chains = list(pool.map(lambda number: _chain(Path(home) / f"chain_{number}", number), range(_CHAINS)))
    done = [kill for chain in chains for kill in chain]
    later = [kill for chain in chains for kill in chain[1:]]
    lost = sum(kill.kept is not None and kill.kept < kill.reached - MOST_LOST for kill in done)
    figures = {
        "kills": len(done),
        "broken_checkpoints": sum(len(kill.broken) for kill in done),
        "without_checkpoint": sum(kill.kept is None for kill in done),
        "lost_more_than_one_save": lost,
        "not_resumed": sum(kill.started_at == 1 for kill in later),
        "left_processes": sum(kill.left_processes for kill in done),
        "slowest_end_seconds": round(max(kill.end_seconds for kill in done), 1),
    }
    zero = ("broken_checkpoints", "without_checkpoint", "lost_more_than_one_save", "not_resumed", "left_processes")
    return Result(figures, dict.fromkeys(zero, ("==", 0)) | {"slowest_end_seconds": ("<=", 60.0)})


def _chain(home: Path, first: int) -> list[Kill]:
    """Every `_CHAINS`th kill, from number `first` on, one after the other."""
    home.mkdir()
    chance = random.Random(first)
    return [kill_once(home, number, VICTIMS[number % len(VICTIMS)], chance) for number in range(first, KILLS, _CHAINS)]


def kill_once(home: Path, number: int, victim: str, chance: random.Random) -> Kill:
    """Start a run that goes on from the newest checkpoint in `home`, kill `victim`, wait for the end, look at what is there."""
    run = _start(home, number)
    wanted = _begins_at(run) + chance.randint(3, 9)
    _wait(lambda: _last_iteration(run) >= wanted, run)
    if victim == "rank in a save":
        _wait(lambda: any(run.path.glob(".iter_*.partial")), run)
    _kill(run, victim)
    killed = time.monotonic()
    status = _end_of(run, unsupervised=victim == "supervisor")
    seconds = time.monotonic() - killed
    _carry(run, home)
    card = newest_complete(list_checkpoints(home / "kept"))
    return Kill(
        victim=victim,
        started_at=_begins_at(run),
        reached=_last_iteration(run),
        kept=card.iteration if card else None,
        broken=tuple(_broken(home / "kept")),
        end_seconds=seconds,
        left_processes=len(processes.marked(str(run.path))) + status.phase.is_active,
    )


def _start(home: Path, number: int) -> RunDirectory:
    source = newest(home / "kept")
    argv = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(free_port()), str(_TRAINER), str(home / f"run_{number}"), str(_STEPS),
    ]  # fmt: skip
    env = {**training_env(gpus=(), world_size=2, is_local=True), **({"DANLU_RESUME": str(source)} if source else {})}
    spec = RunSpec(
        id=f"run_{number}", kind="train", title="kills", argv=argv, cwd=str(home), env=env, created_at=now_utc(),
        stop_seconds=0.0,
    )  # fmt: skip
    return launch(home, spec)


def _kill(run: RunDirectory, victim: str) -> None:
    if victim == "supervisor":
        pid = read_status(run).supervisor_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return
    for stat in processes.marked(str(run.path)):
        line = processes.command_line(stat.pid)
        is_torchrun = "torch.distributed.run" in line
        rank = "0" if victim in ("rank 0", "rank in a save") else "1"
        environment = Path(f"/proc/{stat.pid}/environ").read_bytes().split(b"\0")
        is_rank = str(_TRAINER) in line and not is_torchrun and f"RANK={rank}".encode() in environment
        if is_torchrun if victim == "torchrun" else is_rank:
            os.kill(stat.pid, signal.SIGKILL)
            return
    raise ProcessLookupError(victim)


def _end_of(run: RunDirectory, *, unsupervised: bool) -> RunStatus:
    """The status once nothing of it runs any more. A run without supervisor goes on; a person cancels it."""
    if unsupervised:
        time.sleep(0.5)
        request_stop(run, "cancel")
    deadline = time.monotonic() + _SECONDS
    while (status := read_status(run)).phase.is_active and time.monotonic() < deadline:
        time.sleep(0.05)
    processes.wait_until_gone([stat.pid for stat in processes.marked(str(run.path))], _SECONDS)
    return status


def _carry(run: RunDirectory, home: Path) -> None:
    """What a run left that looks like a checkpoint takes the place of what was kept."""
    kept = home / "kept"
    kept.mkdir(exist_ok=True)
    for checkpoint in run.path.glob("iter_*.pth"):
        checkpoint.rename(kept / checkpoint.name)


def _broken(folder: Path) -> list[str]:
    """Checkpoints that look whole to the app but do not load, or hold wrong numbers."""
    from benchmarks.training.saving_ranks import load

    found = []
    for card in list_checkpoints(folder):
        if not card.is_complete:
            continue
        try:
            load(card.path)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            found.append(f"{card.name}: {error}")
    return found


def _begins_at(run: RunDirectory) -> int:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        log = run.log_file.read_text(encoding="utf-8", errors="replace") if run.log_file.exists() else ""
        if "begins at" in log:
            return int(log.partition("begins at ")[2].split()[0])
        time.sleep(0.05)
    raise TimeoutError(f"{run.id} did not begin: {read_status(run)}")


def _last_iteration(run: RunDirectory) -> int:
    from benchmarks.training.ranks import read_lines

    lines = read_lines(run.metrics_file)
    return int(lines[-1]["iteration"]) if lines else 0


def _wait(is_true: Callable[[], bool], run: RunDirectory) -> None:
    deadline = time.monotonic() + _SECONDS
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(run.log_file.read_text(encoding="utf-8", errors="replace")[-2000:])
        time.sleep(0.002)
