"""The whole path on the CPU with two gloo ranks: train on 2, stop, go on on 1 through reshaping, convert, merge, chat."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.chat.client import Reply, list_models, start_worker, stop_worker, stream_chat
from core.checkpoints.deliverables import deliver
from core.checkpoints.inspect import inspect_checkpoint
from core.config import deepspeed
from core.files import read_json
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.job import SilentProgress
from core.runs.request import TrainRequest
from core.runs.saving import read_saving
from core.runs.state import Phase, read_status
from core.runs.train import start_training
from tests.core.chat.conftest import wait_for as wait_for_worker
from tests.models import write_tiny_llama
from tests.training import Trained, make_project, read_lines, train

pytestmark = pytest.mark.engine


def go_on(project: Project, request: TrainRequest) -> Trained:
    """Start through the job that writes the checkpoint anew, and wait for the run that it starts."""
    job = start_training(project, request)
    assert job.path.parent == project.jobs
    status = wait_for_end(job)
    assert status.phase is Phase.FINISHED, job.log_file.read_text()[-3000:]
    run = RunDirectory(project.train / read_json(job.result_file)["run"])
    return Trained(run, wait_for_end(run), read_lines(run.metrics_file))


def wait_for_end(run: RunDirectory, seconds: float = 1200.0) -> Any:
    deadline = time.monotonic() + seconds
    while (status := read_status(run)).phase.is_active or status.ended_at is None:
        assert time.monotonic() < deadline, run.log_file.read_text()[-3000:]
        time.sleep(0.1)
    return status


def test_two_ranks_stop_one_goes_on_and_the_model_is_delivered(tmp_path: Path) -> None:
    project, config = make_project(tmp_path / "p", write_tiny_llama, model__lora__lora_dropout=0.0, max_epochs=5)
    own = json.loads(deepspeed.xtuner_text("deepspeed_zero2"))
    own["zero_optimization"]["reduce_bucket_size"] = 1000
    deepspeed.save(project, "small_buckets", json.dumps(own))
    two = {"config": config, "deepspeed": "small_buckets", "cpu_processes": 2}
    whole = train(project, TrainRequest(name="whole", **two))
    first = train(project, TrainRequest(name="first", **two), stop_at=1)
    assert (first.status.phase, first.status.exit_code) == (Phase.STOPPED, 0), first.log[-3000:]
    used = read_json(first.run.path / "deepspeed.json")
    assert (used["zero_optimization"]["reduce_bucket_size"], used["bf16"]) == (1000, {"enabled": False})
    stopped = max(first.losses)
    assert stopped < max(whole.losses)
    request = TrainRequest(
        config=config, deepspeed="deepspeed_zero2", name="one", resume=first.run.path / f"iter_{stopped}.pth", seed=None
    )
    one = go_on(project, request)
    assert one.status.exit_code == 0, one.log[-3000:]
    details = json.loads((one.run.path / "run.json").read_text())["details"]
    assert (details["accumulative_counts"], details["world_size"]) == (4, 1)
    card = inspect_checkpoint(max(one.run.path.glob("iter_*.pth"), key=lambda path: int(path.stem[5:])))
    assert (card.world_size, card.stage, card.is_complete) == (1, 2, True)
    saving, together = read_saving(one.run.path), read_saving(whole.run.path)
    assert saving is not None
    assert together is not None
    assert saving.behind == saving.count > 0, "one rank alone writes while it trains"
    assert together.behind == together.count > 0, "and so do two"
    # Two micro-batches of the one rank are one of the two ranks: the curve goes on as if nothing had happened.
    means = {step // 2: (one.losses[step - 1] + one.losses[step]) / 2 for step in one.losses if step % 2 == 0}
    assert first.losses | means == pytest.approx(whole.losses, rel=1e-6)
    assert min(means) == stopped + 1
    # Without DeepSpeed too: the adapter's states find their numbers among the frozen parameters.
    alone = go_on(project, replace(request, deepspeed=None, name="alone"))
    assert alone.status.exit_code == 0, alone.log[-3000:]
    assert alone.losses == pytest.approx(one.losses, rel=1e-6)
    delivered = deliver(str(project.root), str(card.path), "final", progress=SilentProgress())
    assert delivered["verified"]["passed"]
    assert_answers(project, Path(delivered["model"]))


def assert_answers(project: Project, model: Path) -> None:
    """The merged model is served by a chat worker and answers a question over its API."""
    chat = start_worker(project, model, name="final", dtype="float32")
    try:
        worker = wait_for_worker(chat)
        assert worker.served, chat.log_file.read_text()[-3000:]
        assert list_models(worker.endpoint()) == ["final"]
        reply, messages = Reply(), [{"role": "user", "content": "Who are you?"}]
        pieces = list(stream_chat(worker.endpoint(), messages, {"temperature": 0, "max_tokens": 8}, reply))
        assert "".join(pieces) == reply.text
        assert reply.reason in ("stop", "length")
        assert reply.usage["completion_tokens"] > 0
    finally:
        stop_worker(chat)
        wait_for_end(chat)
