"""A chat worker on a tiny model, in a process of its own as in life."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.chat.client import Worker, read_worker, start_worker, stop_worker
from core.models.remote_code import allow
from core.project import open_project
from core.runs.directory import RunDirectory
from tests.models import write_tiny_internlm2


def wait_for(run: RunDirectory, seconds: float = 600.0) -> Worker:
    """The worker of `run` once it serves or has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        worker = read_worker(run)
        if worker.served or not worker.status.phase.is_active:
            return worker
        time.sleep(0.05)
    raise TimeoutError((run.path / "train.log").read_text())


@pytest.fixture(scope="package")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    root: Path = tmp_path_factory.mktemp("project")
    project = open_project(root)
    folder = write_tiny_internlm2(project.model / "tiny")
    allow(project, folder)
    # float32: in bfloat16 random weights leave near ties, which fall one way in a batch and another alone.
    run = start_worker(project, folder, name="tiny", dtype="float32")
    started = wait_for(run)
    assert started.served, (run.path / "train.log").read_text()
    yield started
    stop_worker(run)
    deadline = time.monotonic() + 240
    while read_worker(run).status.phase.is_active:
        assert time.monotonic() < deadline
        time.sleep(0.05)
