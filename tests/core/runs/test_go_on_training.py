"""Pause and go on with the real trainer: the same folder, the next step, and the losses of a run that was never stopped."""

import time
from pathlib import Path

import pytest

from core.runs.again import go_on
from core.runs.metrics import MetricsReader
from core.runs.state import Phase, read_status
from core.runs.train import TrainRequest
from tests.models import write_tiny_qwen2
from tests.training import make_project, train

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]
_SECONDS = 390.0


def test_a_paused_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    project, config = make_project(
        tmp_path / "p", write_tiny_qwen2, model__lora__lora_dropout=0.0, evaluation_inputs=[]
    )
    whole = train(project, TrainRequest(config=config, name="whole", speed="off"), seconds=_SECONDS)
    paused = train(project, TrainRequest(config=config, name="paused", speed="off"), stop_at=3, seconds=_SECONDS)
    assert paused.status.phase is Phase.STOPPED, paused.log[-2000:]
    stopped_at = max(paused.losses)
    card = go_on(paused.run)
    assert card.iteration == stopped_at
    deadline = time.monotonic() + _SECONDS
    while read_status(paused.run).phase.is_active:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status = read_status(paused.run)
    assert status.phase is Phase.FINISHED, paused.log[-3000:]
    assert status.earlier_seconds > 0
    metrics = MetricsReader(paused.run.metrics_file).refresh()
    assert metrics["iteration"].tolist() == sorted(whole.losses)
    assert metrics["loss"].tolist() == pytest.approx([whole.losses[n] for n in sorted(whole.losses)], rel=1e-5)
