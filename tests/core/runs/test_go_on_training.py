"""Pause and go on with the real trainer: the same folder, the next step, and the losses of a run that was never stopped."""

import json
import time
from pathlib import Path

import pytest

from core.data.formats import detect
from core.data.preview import training_segments, training_tokens_of
from core.data.reader import sample_rows, sniff
from core.data.tokenizer import load_tokenizer
from core.project import Project
from core.runs.again import go_on
from core.runs.metrics import MetricsReader
from core.runs.request import TrainRequest
from core.runs.state import Phase, read_status
from core.runs.validation import best_of, read_validation
from core.xtuner.templates import prompt_templates
from core.xtuner.tokens import guess_template
from tests.models import write_tiny_qwen2
from tests.training import make_project, train, validate_on

pytestmark = pytest.mark.engine
_SECONDS = 1200.0


def test_a_paused_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    project, config = make_project(
        tmp_path / "p", write_tiny_qwen2, model__lora__lora_dropout=0.0, evaluation_inputs=[]
    )
    held_out = validate_on(project, config, validation_freq=4, save_total_limit=1)
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
    # What the stop left out was made up for, and the best checkpoint stands beside the last one.
    last = max(whole.losses)
    assert list(whole.validations) == sorted({*range(0, last + 1, 4), last})
    assert dict(read_validation(paused.run)) == pytest.approx(whole.validations, rel=1e-5)
    assert whole.validations[0] == pytest.approx(loss_of(project, held_out), rel=1e-5)
    for run in (whole.run, paused.run):
        best = best_of(run)
        assert best is not None
        assert best.loss == pytest.approx(min(whole.validations.values()), rel=1e-5)
        assert {path.name for path in run.path.glob("iter_*")} == {f"iter_{best.iteration}.pth", f"iter_{last}.pth"}


def loss_of(project: Project, file: Path) -> float:
    """Mean loss of the base model over every learned token of `file`: row by row, by transformers and our own reading of the rows."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = project.model / "tiny"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(project, folder)
    template, detection = prompt_templates()[str(guess_template(folder))], detect(sample_rows(sniff(file)))
    total, count = 0.0, 0
    for line in file.read_text(encoding="utf-8").splitlines():
        segments = training_segments(json.loads(line), detection.format, detection.columns, template, tokenizer)
        tokens = [token for token in training_tokens_of(segments, tokenizer, 64) if not token.is_cut]
        ids = torch.tensor([[token.id for token in tokens]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double().log_softmax(-1)
        learned = torch.tensor([token.is_learned for token in tokens[1:]])
        total -= float(logits.gather(1, ids[0, 1:, None])[:, 0][learned].sum())
        count += int(learned.sum())
    return total / count
