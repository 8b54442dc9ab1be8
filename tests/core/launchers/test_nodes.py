"""Two machines, as two network namespaces joined by a cable: they join, train, and one that is cut off is missed."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from core.launchers import node
from core.launchers.nodes import (
    NodeReport,
    NodesWish,
    differing_versions,
    local_argv,
    node_env,
    paste_command,
    read_nodes,
)
from core.project import Project, open_project
from core.runs.again import go_on
from core.runs.control import request_stop
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, now_utc
from core.runs.state import Phase, read_status
from core.xtuner.command import free_port
from tests.core.runs.test_resume import write_checkpoint
from tests.training import read_lines
from tests.waiting import has_stopped

RANKS = Path(__file__).with_name("counting_ranks.py")
SPACE, CABLE, OTHER_END = f"danlu_{os.getpid()}", f"dl{os.getpid()}a", f"dl{os.getpid()}b"
"""Of this process alone: the tests may run twice on a machine."""
_NET = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
HERE, THERE = f"{_NET}.1", f"{_NET}.2"
PATIENCE_SECONDS = 600.0
"""For what hangs, not for what is slow."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=240)


@pytest.fixture
def cable() -> Iterator[str]:
    """A namespace that reaches this machine over a veth pair only; the name of our end."""
    subprocess.run(["ip", "netns", "del", SPACE], check=False, capture_output=True)
    ip("netns", "add", SPACE)
    try:
        ip("link", "add", CABLE, "type", "veth", "peer", "name", OTHER_END, "netns", SPACE)
        ip("addr", "add", f"{HERE}/24", "dev", CABLE)
        ip("link", "set", CABLE, "up")
        for line in (
            ("addr", "add", f"{THERE}/24", "dev", OTHER_END),
            ("link", "set", OTHER_END, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", SPACE, *line)
        yield CABLE
    finally:
        subprocess.run(["ip", "link", "del", CABLE], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", SPACE], check=False, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "p"
    root.mkdir()
    return open_project(root)


def start(project: Project, name: str, steps: int) -> tuple[RunDirectory, "subprocess.Popen[bytes]"]:
    """The run on this machine, and the pasted command on the other one."""
    wish = NodesWish(address=HERE, port=two_free_ports(), processes=1, has_gpus=False, interface=CABLE)
    folder = project.train / name
    spec = RunSpec(
        id=name, kind="train", title=name, argv=local_argv(sys.executable, folder), cwd=str(project.root),
        env=node_env(wish, is_local=True), created_at=now_utc(), stop_seconds=PATIENCE_SECONDS,
        details={"nodes": wish.to_json(), "program": [str(RANKS), str(folder), str(steps)]},
    )  # fmt: skip
    folder.mkdir()
    write_checkpoint(folder / "template.bin")
    run = launch(project.train, spec)
    return run, paste(project, run)


def two_free_ports() -> int:
    """The first of them: node 0 listens on the one after it, too."""
    while True:
        port = free_port()
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port + 1))
            return port


def paste(project: Project, run: RunDirectory) -> "subprocess.Popen[bytes]":
    """What a person does on the other machine."""
    text = paste_command(run.spec(), run.path, 1).replace(CABLE, OTHER_END)
    with open(project.root / f"{run.id}.log", "ab") as log:
        return subprocess.Popen(["ip", "netns", "exec", SPACE, "bash", "-c", text], stdout=log, stderr=log)


def wait_until(is_true: Any, run: RunDirectory) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        logs = [file.read_text(errors="replace")[-2000:] for file in (run.log_file, *run.path.parents[1].glob("*.log"))]
        assert time.monotonic() < deadline, "\n".join(logs)
        time.sleep(0.1)


@pytest.mark.engine
def test_two_nodes_train_together_and_a_cut_off_one_is_missed_and_comes_back(project: Project, cable: str) -> None:
    whole, other = start(project, "whole", 5)
    wait_until(lambda: not read_status(whole).phase.is_active, whole)
    assert read_status(whole).phase is Phase.FINISHED, whole.log_file.read_text()
    assert other.wait(PATIENCE_SECONDS) == 0
    assert [line["loss"] for line in read_lines(whole.metrics_file)] == [2.0] * 5, "both nodes were counted"
    assert [(each.rank, each.state, each.exit_code) for each in read_nodes(whole)] == [(0, "ended", 0), (1, "ended", 0)]

    run, other = start(project, "cut", 100_000)
    try:
        wait_until(lambda: bool(list(run.path.glob("iter_*.pth"))), run)
        ip("link", "set", cable, "down")
        wait_until(lambda: not read_status(run).phase.is_active, run)
        assert read_status(run).phase is Phase.FAILED
        error = json.loads(run.error_file.read_text())
        assert (error["code"], error["params"]["rank"]) == ("nodes.lost", 1)
        assert next(each.state for each in read_nodes(run) if each.rank == 1) in ("lost", "ended")
        assert other.wait(PATIENCE_SECONDS) != 0, "the other side notices too"
        ip("link", "set", cable, "up")
        last = read_lines(run.metrics_file)[-1]["iteration"]
        saved = int(go_on(run).path.stem.removeprefix("iter_"))
        assert last - 5 <= saved <= last
        other = paste(project, run)
        wait_until(lambda: read_lines(run.metrics_file)[-1]["iteration"] > last + 1, run)
        request_stop(run, "save")
        wait_until(lambda: not read_status(run).phase.is_active, run)
        assert (read_status(run).phase, other.wait(PATIENCE_SECONDS)) == (Phase.STOPPED, 0)
        again = [line for line in read_lines(run.metrics_file)[last:] if line["loss"] == 2.0]
        assert [line["iteration"] for line in again] == list(range(saved + 1, saved + 1 + len(again)))
    finally:
        other.kill()
        if read_status(run).phase.is_active:
            request_stop(run, "cancel")
            assert has_stopped(run, PATIENCE_SECONDS)


def test_a_wait_for_nodes_can_be_cancelled(project: Project) -> None:
    wish = NodesWish(address="127.0.0.1", port=two_free_ports(), has_gpus=False)
    folder = project.train / "alone"
    spec = RunSpec(
        id="alone", kind="train", title="alone", argv=local_argv(sys.executable, folder), cwd=str(project.root),
        env=node_env(wish, is_local=True), created_at=now_utc(), details={"nodes": wish.to_json()},
    )  # fmt: skip
    run = launch(project.train, spec)
    wait_until(lambda: bool(read_nodes(run)), run)
    request_stop(run, "cancel")
    assert has_stopped(run, PATIENCE_SECONDS)


def test_an_address_that_nobody_has_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "SILENT_SECONDS", 0.1)
    with pytest.raises(node.JobError, match="unreachable"):
        node._connect(NodesWish(address="127.0.0.1", port=1))


def test_versions_are_compared() -> None:
    reports = [
        NodeReport(rank, host, "ready", {"python": "3.11.7", "torch": torch}, 0.0)
        for rank, host, torch in ((0, "a", "2.9.0"), (1, "b", "2.8.0"))
    ]
    assert differing_versions(reports) == ["torch: 2.9.0 (a) ≠ 2.8.0 (b)"]
    assert differing_versions(reports[:1]) == []


@pytest.mark.parametrize("address", ["", "a b", "x;rm -rf /", "$(id)"])
def test_addresses_go_into_a_shell_and_are_checked(address: str) -> None:
    with pytest.raises(InputError, match="bad_address"):
        NodesWish(address=address)


def test_the_command_to_paste_is_whole(tmp_path: Path) -> None:
    wish = NodesWish(address="10.0.0.1", processes=4, interface="eth0")
    run = tmp_path / "my run"
    spec = RunSpec(
        id="x", kind="train", title="x", argv=local_argv("/py", run), cwd=str(tmp_path), env=node_env(wish, is_local=True),
        created_at=now_utc(),
    )  # fmt: skip
    text = paste_command(spec, run, 1)
    assert text.startswith(f"cd {tmp_path}")
    assert "export NCCL_SOCKET_IFNAME=eth0" in text
    assert "export CUDA_VISIBLE_DEVICES=0,1,2,3" in text
    assert text.endswith(f"/py -m core.launchers.node '{run}' 1")
