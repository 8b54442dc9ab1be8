"""Real training on the CPU through the real entry: torchrun, XTuner, tiny random models."""

import json
import math
from pathlib import Path

import pytest

from core.chat.client import Reply, start_worker, stop_worker, stream_chat
from core.checkpoints.deliverables import deliver
from core.checkpoints.inspect import inspect_checkpoint
from core.config.source import ConfigSource
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.job import SilentProgress
from core.runs.request import TrainRequest
from core.runs.saving import read_saving
from core.runs.startup import PHASES, read_startup
from core.runs.state import Phase
from core.runs.validation import best_of, early_end
from core.xtuner.runtime.speed.parts import read_reports
from tests.core.chat.conftest import wait_for
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2
from tests.saving import OWN, assert_same
from tests.training import Trained, hooked_config, make_project, train, validate_on

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path, Trained]:
    """An uninterrupted run of InternLM2 (remote code), LoRA with dropout."""
    project, config = make_project(tmp_path_factory.mktemp("internlm2") / "p", write_tiny_internlm2)
    assert ConfigSource(config.read_text()).get("model.lora.lora_dropout") > 0
    return project, config, train(project, TrainRequest(config=config, name="whole"))


def test_a_run_leaves_metrics_samples_and_checkpoints(internlm2: tuple[Project, Path, Trained]) -> None:
    _, _, whole = internlm2
    assert (whole.status.phase, whole.status.exit_code) == (Phase.FINISHED, 0), whole.log[-3000:]
    total = whole.lines[0]["total_iterations"]
    assert [line["iteration"] for line in whole.lines] == list(range(1, total + 1))
    assert all(math.isfinite(line["loss"]) and line["tokens"] == 64 for line in whole.lines)
    assert all(line["step_seconds"] >= line["data_seconds"] >= 0 for line in whole.lines)
    # The weights move every second micro-step, and at the very end.
    assert [line["iteration"] for line in whole.lines if line["grad_norm"]] == [*range(2, total + 1, 2)] + [total] * (
        total % 2
    )
    assert whole.losses[total] < whole.losses[1]
    assert [sample["iteration"] for sample in whole.samples] == [0, total]
    assert {sample["prompt"] for sample in whole.samples} == {"Who are you?"}
    kept = {path.name for path in whole.run.path.glob("*.pth")}
    assert kept == {f"iter_{total - total % 4}.pth", f"iter_{total}.pth"} or kept == {
        f"iter_{total - 4}.pth",
        f"iter_{total}.pth",
    }
    assert all(inspect_checkpoint(whole.run.path / name).is_complete for name in kept)
    assert not list(whole.run.path.glob(".*partial"))
    startup, saving = read_startup(whole.run.path, whole.status.started_at), read_saving(whole.run.path)
    assert startup is not None
    assert list(startup.seconds) == list(PHASES)
    assert 0 < startup.total_seconds <= whole.lines[0]["at"] - (whole.status.started_at or 0) + 0.01
    assert saving is not None
    assert (saving.count, saving.behind, saving.why) == (
        len(range(4, total + 1, 4)) + bool(total % 4),
        saving.count,
        None,
    )


def test_the_log_says_what_was_patched_and_why(internlm2: tuple[Project, Path, Trained]) -> None:
    log = internlm2[2].log
    for name in ("caches", "set_device", "gloo", "zero_warmup"):
        assert f"danlu: patch {name} (" in log


def test_the_speed_layer_is_on_by_default_and_says_what_it_does(internlm2: tuple[Project, Path, Trained]) -> None:
    whole = internlm2[2]
    reports = {report.name: report.applied for report in read_reports(whole.run.path)}
    assert {name for name, is_on in reports.items() if is_on} == {
        "fast_pass",
        "block_attention",
        "grouped_micro_batches",
        "selective_recomputation",
    }
    assert "speed: norm_kernel left out: needs Triton" in whole.log


def test_resumed_and_stopped_run_goes_on_bit_for_bit(internlm2: tuple[Project, Path, Trained]) -> None:
    project, config, whole = internlm2
    middle = sorted(whole.run.path.glob("iter_*.pth"), key=lambda path: int(path.stem[5:]))[0]
    start = int(middle.stem[5:])
    first = train(project, TrainRequest(config=config, name="part"), stop_at=1)
    assert (first.status.phase, first.status.exit_code) == (Phase.STOPPED, 0), first.log[-3000:]
    stopped = max(first.losses)
    assert stopped < max(whole.losses)
    assert stopped % 2 == 0, "it stops at the end of an accumulation window"
    saved = first.run.path / f"iter_{stopped}.pth"
    assert inspect_checkpoint(saved).is_complete
    assert start > 0
    resumed = train(project, TrainRequest(config=config, name="rest", resume=saved, seed=None))
    assert resumed.status.exit_code == 0, resumed.log[-3000:]
    assert first.losses | resumed.losses == whole.losses
    # The second run took the first one's tokenised data, and so did the third: its seed is that of the checkpoint.
    assert ["danlu: tokenising" in run.log for run in (whole, first, resumed)] == [True, False, False]


def test_internlm2_goes_all_the_way_to_a_chat(internlm2: tuple[Project, Path, Trained]) -> None:
    """Checkpoint → adapter → merged model → chat worker, whose answer is that of a greedy loop without a cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from core.chat.prompt import make_encoder

    project, _, whole = internlm2
    last = max(whole.run.path.glob("iter_*.pth"), key=lambda path: int(path.stem[5:]))
    delivered = deliver(str(project.root), str(last), "final", progress=SilentProgress())
    assert delivered["verified"]["passed"]
    merged = Path(delivered["model"])
    worker = start_worker(project, merged, dtype="float32")
    try:
        messages = [{"role": "user", "content": "Who are you?"}]
        endpoint = wait_for(worker).endpoint()
        answer = "".join(stream_chat(endpoint, messages, {"temperature": 0.0, "max_tokens": 24}, Reply()))
    finally:
        stop_worker(worker)
    model = AutoModelForCausalLM.from_pretrained(merged, torch_dtype=torch.float32, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=True)
    encoder = make_encoder(tokenizer, merged, None)
    ids, expected = encoder.encode(messages), list[int]()
    with torch.no_grad():
        while len(expected) < 24:
            token = int(model(torch.tensor([ids + expected]), use_cache=False).logits[0, -1].argmax())
            if token in encoder.stop_tokens():
                break
            expected.append(token)
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer


def test_deepspeed_on_two_processes_trains_and_resumes(tmp_path: Path) -> None:
    project, config = make_project(tmp_path / "p", write_tiny_llama, model__lora__lora_dropout=0.0)
    validate_on(project, config, validation_freq=4)
    options = {"deepspeed": "deepspeed_zero2", "cpu_processes": 2}
    # Both micro-batches of a window at once, and samples that see each other as in stock XTuner.
    seeing = {"parts": ["fast_pass", "grouped_micro_batches", "selective_recomputation"], "tokens_per_pass": 128}
    twice = hooked_config(config, "saving.SaveTwice", after=4)
    whole = train(project, TrainRequest(config=twice, name="whole", speed=seeing, **options))
    assert whole.status.exit_code == 0, whole.log[-3000:]
    assert all(line["tokens"] == 128 for line in whole.lines), "tokens of both processes"
    assert any(line["grad_norm"] for line in whole.lines)
    saved = whole.run.path / "iter_4.pth"
    card = inspect_checkpoint(saved)
    assert (card.is_complete, card.world_size, card.stage) == (True, 2, 2)
    assert_same(saved, whole.run.path / OWN)
    rest = train(project, TrainRequest(config=config, name="rest", resume=saved, seed=None, speed=seeing, **options))
    assert rest.status.exit_code == 0, rest.log[-3000:]
    assert rest.losses == {step: loss for step, loss in whole.losses.items() if step > 4}
    assert "2 micro-batches, 128 tokens in a pass" in whole.log
    apart = hooked_config(config, "saving.ManyMachines")
    stock = train(project, TrainRequest(config=apart, name="stock", speed="off", **options))
    assert stock.losses == pytest.approx(whole.losses, abs=1e-4)
    # By the fast pass and by the stock one, over the rows of both processes.
    assert stock.validations == pytest.approx(whole.validations, abs=1e-4)
    assert len(whole.validations) >= 3
    assert rest.validations == {step: loss for step, loss in whole.validations.items() if step > 4}
    # On one machine the ranks write behind the training; several wait until all have written.
    behind, together = read_saving(whole.run.path), read_saving(stock.run.path)
    assert behind is not None
    assert together is not None
    assert (behind.count, behind.behind, behind.why) == (2, 2, None)
    assert (together.count, together.behind, together.why) == (2, 0, "deepspeed")
    assert all(inspect_checkpoint(stock.run.path / f"iter_{step}.pth").is_complete for step in (4, max(stock.losses)))
    assert not [*whole.run.path.glob(".*partial"), *stock.run.path.glob(".*partial")]
    moved = [line["iteration"] for line in stock.lines if line["grad_norm"]]
    assert moved == [line["iteration"] for line in whole.lines if line["grad_norm"]]


def test_qlora_trains_on_the_cpu(tmp_path: Path) -> None:
    project, config = make_project(tmp_path / "p", write_tiny_qwen2, method="qlora", evaluation_inputs=["你是谁？"])
    validate_on(project, config, validation_freq=4, early_stop_patience=2, early_stop_min_delta=9.0)
    trained = train(project, TrainRequest(config=config))
    assert trained.status.exit_code == 0, trained.log[-3000:]
    # Nothing falls by 9: it ends early after two validations, as a run that is finished, with its weights saved.
    end, best = early_end(trained.run), best_of(trained.run)
    assert end is not None
    assert best is not None
    assert (trained.status.phase, end.iteration, max(trained.losses)) == (Phase.FINISHED, 8, 8)
    assert trained.lines[-1]["total_iterations"] > 8
    assert best.checkpoint == trained.run.path / "iter_8.pth"
    assert json.loads((trained.run.path / "run.json").read_text())["details"]["method"] == "qlora"
    assert trained.lines[-1]["loss"] < trained.lines[0]["loss"]


def test_a_known_failure_is_explained(tmp_path: Path) -> None:
    """Every answer is cut off by max_length: XTuner drops all rows and dies of a missing column."""
    project, config = make_project(tmp_path / "p", write_tiny_llama, max_length=4)
    failed = train(project, TrainRequest(config=config))
    assert failed.status.phase == Phase.FAILED
    error = json.loads(RunDirectory(failed.run.path).error_file.read_text())
    assert error["code"] == "train.no_trained_rows"
