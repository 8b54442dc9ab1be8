"""One node of a training on several machines: `python -m core.launchers.node RUN_DIR RANK`.

Node 0 listens; the others join over TCP and stay connected, a sign of life a second. When all are there, can see the run's folder
and have the same packages, each starts torchrun. A node that falls silent ends the training everywhere, within `SILENT_SECONDS`:
the collectives themselves would wait for half an hour.
"""

import importlib.metadata
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError, JobError, MachineError
from core.files import write_json
from core.i18n import catalog
from core.launchers.nodes import COMPARED, NODES_FOLDER, NodesWish, differing_versions, read_nodes
from core.runs.directory import RunDirectory
from core.xtuner.command import node_argv

SILENT_SECONDS: Final = 20.0
"""A node not heard of for so long is lost."""
JOIN_SECONDS: Final = 1800.0
"""How long node 0 waits for the others: a person has to paste a command on each."""
_BEAT_SECONDS: Final = 1.0
_EXIT_EXPLAINED: Final = 3
_KILL_SECONDS: Final = 10.0


@dataclass
class _Table:
    """What node 0 knows of the others. Written by one thread for each."""

    ready: set[int] = field(default_factory=set)
    heard: dict[int, float] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    word: str = "wait"
    """What the others are told: wait, go, end."""


def main(argv: list[str]) -> int:
    run, rank = RunDirectory(Path(argv[0])), int(argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wish = NodesWish.from_json(run.spec().details["nodes"])
    try:
        return _lead(run, wish) if rank == 0 else _follow(run, wish, rank)
    except DanluError as error:
        what, next_step = catalog("en").explain(error)
        print(f"{error.code}: {what} {next_step}", file=sys.stderr, flush=True)
        if rank == 0:
            write_json(run.error_file, error.to_json())
        return _EXIT_EXPLAINED


def report(run: RunDirectory, rank: int, state: str, exit_code: int | None = None) -> None:
    """Say of this node what the page shows; through the shared folder, which is thereby proved to be one."""
    value = {
        "rank": rank, "host": socket.gethostname(), "state": state, "versions": _versions(), "at": time.time(),
        "exit_code": exit_code,
    }  # fmt: skip
    write_json(run.path / NODES_FOLDER / f"{rank}.json", value)


def _lead(run: RunDirectory, wish: NodesWish) -> int:
    table = _Table()
    others = set(range(1, wish.nodes))
    for old in (run.path / NODES_FOLDER).glob("*.json"):
        old.unlink()  # of an earlier attempt: nobody is there yet
    with _server(wish.port + 1) as server:
        threading.Thread(target=_listen, args=(server, table, run.id), daemon=True).start()
        report(run, 0, "joining")
        _wait_for_all(run, table, others)
        table.word = "go"
        report(run, 0, "running")
        child = subprocess.Popen(_argv(run, wish, 0))
        try:
            code = _attend(run, child, lambda: _silent(table, others))
            _let_end(table, others, seconds=0 if code else SILENT_SECONDS)
        finally:
            table.word = "end"
            _end(child)
            time.sleep(2 * _BEAT_SECONDS)  # The others hear the word with their next sign of life.
        report(run, 0, "ended", code)
        return code


def _server(port: int) -> socket.socket:
    """Raises MachineError `nodes.port_in_use` if something listens there already."""
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise MachineError("nodes.port_in_use", port=port, reason=error.strerror or str(error)) from error


def _wait_for_all(run: RunDirectory, table: _Table, others: set[int]) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    said: set[int] = set()
    while table.ready != others:
        for rank in table.ready - said:
            print(f"danlu: node {rank} is there", flush=True)
            said.add(rank)
        if time.monotonic() > deadline:
            missing = ", ".join(map(str, sorted(others - table.ready)))
            raise JobError("nodes.missing", missing=missing, minutes=round(JOIN_SECONDS / 60))
        if run.stop_file.exists():
            raise JobError("runs.cancelled")
        time.sleep(0.1)
    reports = read_nodes(run)
    unseen = sorted({*others, 0} - {each.rank for each in reports})
    if unseen:
        raise JobError("nodes.folder_not_shared", missing=", ".join(map(str, unseen)), path=str(run.path))
    if differing := differing_versions(reports):
        raise JobError("nodes.versions_differ", entries="; ".join(differing))


def _listen(server: socket.socket, table: _Table, run_id: str) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # The training is over.
        threading.Thread(target=_hear, args=(connection, table, run_id), daemon=True).start()


def _hear(connection: socket.socket, table: _Table, run_id: str) -> None:
    """One line a sign of life: `<run> <rank> <state>`; the answer is the word."""
    with connection, connection.makefile("rw", encoding="utf-8", newline="\n") as stream:
        for line in stream:
            said, _, rest = line.strip().partition(" ")
            rank, _, state = rest.partition(" ")
            if said != run_id or not rank.isdecimal():
                return
            table.heard[int(rank)] = time.monotonic()
            (table.ended if state == "ended" else table.ready).add(int(rank))
            stream.write(f"{table.word}\n")
            stream.flush()


def _let_end(table: _Table, others: set[int], *, seconds: float) -> None:
    """After a good end the other nodes end by themselves; those that do not are told to."""
    deadline = time.monotonic() + seconds
    while not others <= table.ended and time.monotonic() < deadline:
        time.sleep(0.1)


def _silent(table: _Table, others: set[int]) -> int | None:
    """A node that was not heard of for too long and had not ended."""
    now = time.monotonic()
    return next((r for r in others - table.ended if now - table.heard.get(r, now) > SILENT_SECONDS), None)


def _attend(run: RunDirectory, child: "subprocess.Popen[bytes]", silent: Any) -> int:
    """Wait for torchrun; raises JobError if a node falls silent meanwhile."""
    while (code := child.poll()) is None:
        if (rank := silent()) is not None:
            write_lost(run, rank)
            raise JobError("nodes.lost", rank=rank, seconds=round(SILENT_SECONDS))
        time.sleep(0.2)
    return code


def write_lost(run: RunDirectory, rank: int) -> None:
    """Note on its behalf that a node is gone."""
    last = next((each for each in read_nodes(run) if each.rank == rank), None)
    value = {
        "rank": rank,
        "host": last.host if last else "?",
        "state": "lost",
        "versions": last.versions if last else {},
    }
    write_json(run.path / NODES_FOLDER / f"{rank}.json", {**value, "at": time.time()})


def _follow(run: RunDirectory, wish: NodesWish, rank: int) -> int:
    report(run, rank, "joining")
    with _connect(wish) as connection, connection.makefile("rw", encoding="utf-8", newline="\n") as stream:
        report(run, rank, "ready")
        while (word := _beat(stream, run, rank, "ready")) == "wait":
            time.sleep(_BEAT_SECONDS)
        if word != "go":
            raise JobError("nodes.leader_gone", address=wish.address)
        report(run, rank, "running")
        child = subprocess.Popen(_argv(run, wish, rank))
        try:
            while (code := child.poll()) is None:
                if _beat(stream, run, rank, "running") != "go":
                    raise JobError("nodes.leader_gone", address=wish.address)
                time.sleep(_BEAT_SECONDS)
        finally:
            _end(child)
            report(run, rank, "ended", child.returncode)
        _beat(stream, run, rank, "ended")
        return code


def _beat(stream: Any, run: RunDirectory, rank: int, state: str) -> str:
    """A sign of life and the word that comes back; `end` if node 0 is gone or cannot be reached."""
    try:
        stream.write(f"{run.id} {rank} {state}\n")
        stream.flush()
        return str(stream.readline()).strip() or "end"
    except OSError:
        return "end"


def _connect(wish: NodesWish) -> socket.socket:
    """Raises JobError if node 0 cannot be reached: says whether the name, the way or the port is the trouble."""
    place = (wish.address, wish.port + 1)
    deadline = time.monotonic() + SILENT_SECONDS
    while True:
        try:
            connection = socket.create_connection(place, timeout=5.0)
        except socket.gaierror as error:
            raise JobError("nodes.unknown_address", address=wish.address, reason=str(error)) from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise JobError("nodes.unreachable", address=wish.address, port=place[1], reason=str(error)) from error
            time.sleep(0.5)
        else:
            connection.settimeout(SILENT_SECONDS)
            return connection


def _argv(run: RunDirectory, wish: NodesWish, rank: int) -> list[str]:
    made = node_argv(
        sys.executable,
        run.path,
        nodes=wish.nodes,
        node_rank=str(rank),
        processes=wish.processes,
        address=wish.address,
        port=str(wish.port),
    )
    # A test names another program than the entry.
    program = run.spec().details.get("program")
    return [*made[: made.index("-m", made.index("--master_port"))], *program] if program else made


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in COMPARED[1:]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
