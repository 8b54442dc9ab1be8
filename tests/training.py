"""Small projects and real training runs for engine tests: a tiny model, a few rows, XTuner itself on the CPU."""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.config.facts import Machine, read_data, read_model
from core.config.presets import Wishes, make
from core.config.source import ConfigSource
from core.config.validation import set_validation
from core.models.remote_code import allow
from core.project import Project, open_project
from core.runs.directory import RunDirectory
from core.runs.request import TrainRequest
from core.runs.state import RunStatus, read_status
from core.runs.train import start_training
from core.runs.validation import read_validation

ROWS = 22
"""At 64 tokens a sample: a dozen iterations an epoch."""


def write_rows(file: Path, rows: int = ROWS) -> Path:
    """`messages` rows of an identity, no two alike."""
    questions = ("Who are you?", "What can you do?", "你是谁？", "请介绍一下你自己。")
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(rows):
            answer = f"I am a small assistant, trained by Ada. 你好 {number}."
            turns = [("user", f"{questions[number % 4]} {number}"), ("assistant", answer)]
            row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def make_project(root: Path, write_model: Any, *, method: str = "lora", **edits: Any) -> tuple[Project, Path]:
    """A project with model, data and a config of the preset; `edits` are config paths (with __ for the dot) and values."""
    root.mkdir(parents=True, exist_ok=True)
    project = open_project(root)
    folder = write_model(project.model / "tiny")
    allow(project, folder)
    model = read_model(folder)
    data = read_data(write_rows(project.data / "rows.jsonl"))
    wishes = Wishes(method=method, max_length=64, max_epochs=1, accumulative_counts=2)
    source = ConfigSource(make(model, data, Machine(cpu_count=2), wishes))
    for path, value in {
        "save_steps": 4,
        "evaluation_freq": 100,
        "evaluation_inputs": ["Who are you?"],
        **edits,
    }.items():
        source = source.set(path.replace("__", "."), value)
    config = project.config / "tiny.py"
    config.write_text(source.text, encoding="utf-8")
    return project, config


def validate_on(project: Project, config: Path, rows: int = 7, **settings: Any) -> Path:
    """Let the config validate on rows of its own; `settings` are variables of the config. Returns the rows' file."""
    file = write_rows(project.data / "held_out.jsonl", rows)
    source = set_validation(ConfigSource(config.read_text(encoding="utf-8")), read_data(file))
    for name, value in settings.items():
        source = source.set(name, value)
    config.write_text(source.text, encoding="utf-8")
    return file


@dataclass
class Trained:
    """A run that has ended."""

    run: RunDirectory
    status: RunStatus
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def log(self) -> str:
        return self.run.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def losses(self) -> dict[int, float]:
        return {line["iteration"]: line["loss"] for line in self.lines}

    @property
    def validations(self) -> dict[int, float]:
        return dict(read_validation(self.run))

    @property
    def samples(self) -> list[dict[str, Any]]:
        return read_lines(self.run.samples_file)


def train(project: Project, request: TrainRequest, *, stop_at: int | None = None, seconds: float = 1200.0) -> Trained:
    """Start a run as the app does and wait for its end; with `stop_at`, it is asked to stop when so many iterations are done."""
    if stop_at is not None:
        request = replace(request, config=stopping_config(request.config, stop_at))
    run = start_training(project, request)
    deadline = time.monotonic() + seconds
    while True:
        status = read_status(run)
        if not status.phase.is_active and status.ended_at is not None:
            return Trained(run, status, read_lines(run.metrics_file))
        if time.monotonic() > deadline:
            run.stop_file.write_text(json.dumps({"mode": "cancel", "at": time.time()}), encoding="utf-8")
            raise TimeoutError(run.log_file.read_text(encoding="utf-8", errors="replace")[-4000:])
        time.sleep(0.2)


def stopping_config(config: Path, after: int) -> Path:
    """A copy of `config` beside it that asks for a stop when `after` iterations are done, however fast they are."""
    return hooked_config(config, "stopping.AskToStop", after=after)


def hooked_config(config: Path, hook: str, **options: Any) -> Path:
    """A copy of `config` beside it with one more hook, `module.Class` of `tests`."""
    module, _, name = hook.partition(".")
    copy = config.with_name(f"{config.stem}_{module}.py")
    lines = f"from tests.{module} import {name}\ncustom_hooks.append(dict(type={name}, **{options}))\n"
    copy.write_text(f"{config.read_text(encoding='utf-8')}\n{lines}", encoding="utf-8")
    return copy


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file."""
    if not file.exists():
        return []
    return [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
