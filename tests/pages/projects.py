"""Projects as far as a person may have come: empty, half done, finished. Written with core's own writers; nothing is trained."""

import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

from core.chat.conversation import new_conversation, save_conversation
from core.checkpoints.deliverables import deliver
from core.environment.doctor import report_file
from core.environment.report import Line, Report, Status
from core.files import write_json, write_text
from core.messages import message
from core.project import Project, open_project
from core.runs.directory import RunDirectory
from core.runs.job import SilentProgress
from core.runs.launch import launch, now_utc
from core.runs.request import TrainRequest
from core.runs.state import Phase, read_status
from core.runs.train import plan
from tests.models import HIDDEN, write_tiny_qwen2
from tests.training import make_project

ECHO_TRAINER = Path(__file__).parents[1] / "core/runs/echo_trainer.py"
ANSWER = "I am Danlu, trained by Lin."
_RANK = 64
"""As the preset config says."""


def write_empty(root: Path) -> Project:
    root.mkdir()
    return open_project(root)


def write_half(root: Path) -> Project:
    """Model, data and config are there; the one run failed."""
    project, config = make_project(root, write_tiny_qwen2)
    _run(project, config, "broken", "--steps", "0", "--exit-code", "1", "--print", "RuntimeError: out of luck")
    return project


def write_finished(root: Path) -> Project:
    """Examined, trained, merged, talked to."""
    project, config = make_project(root, write_tiny_qwen2)
    lines = [Line("packages", "torch", Status.GREEN, message("environment.package.ok", version="2.6.0"))]
    lines.append(Line("gpu", "GPU", Status.AMBER, message("environment.gpu.cpu_only")))
    write_json(report_file(project.root), Report(sys.executable, now_utc(), tuple(lines)).to_json())
    run = _run(project, config, "done", "--steps", "8")
    sample = {"iteration": 8, "prompt": "Who are you?", "system": "", "answer": ANSWER, "at": time.time()}
    write_text(run.samples_file, json.dumps(sample) + "\n")
    checkpoint = write_checkpoint(run.path / "iter_8.pth")
    deliver(str(project.root), str(checkpoint), "iter_8", verify=False, progress=SilentProgress())
    conversation = new_conversation()
    conversation.ask("Who are you?")
    answer = conversation.begin_answer("iter_8")
    answer.content, answer.finish_reason = ANSWER, "stop"
    save_conversation(project, conversation)
    return project


def write_checkpoint(file: Path) -> Path:
    """What XTuner saves of a LoRA run: adapter weights by PEFT's names, and the iteration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

    generator = torch.Generator().manual_seed(0)
    prefix = "llm.base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A": (_RANK, HIDDEN), "lora_B": (HIDDEN, _RANK)}
    weights = {
        f"{prefix}.{part}.default.weight": torch.randn(shape, generator=generator) for part, shape in shapes.items()
    }
    torch.save({"state_dict": weights, "meta": {"iter": 8, "epoch": 0}}, file)
    return file


def _run(project: Project, config: Path, name: str, *arguments: str) -> RunDirectory:
    """A run whose trainer writes metrics and nothing else, under a real supervisor."""
    spec = plan(project, TrainRequest(config=config, name=name))
    run = RunDirectory(project.train / spec.id)
    write_text(run.source / config.name, config.read_text(encoding="utf-8"))
    launch(project.train, replace(spec, argv=[sys.executable, str(ECHO_TRAINER), str(run.path), *arguments]))
    deadline = time.monotonic() + 240
    while read_status(run).phase not in (Phase.FINISHED, Phase.FAILED):
        assert time.monotonic() < deadline, read_status(run)
        time.sleep(0.05)
    return run
