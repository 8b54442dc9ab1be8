"""The whole journey without a browser: `python -m core.demo`. The embedded model learns who it is, is merged, and says so.

Uses what the pages use, through the same jobs and run directories. Prints one report; exit code 0 only if every step held.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from core.chat.client import Reply, read_worker, start_worker, stop_worker, stream_chat
from core.checkpoints.deliverables import start_delivery
from core.checkpoints.inspect import list_checkpoints, newest_complete
from core.config.checks import Surroundings, fix_all
from core.config.edits import set_method
from core.config.facts import read_data, read_machine, read_model
from core.config.library import copy_config, read_config, save_config
from core.config.library import open_draft as open_config
from core.config.recipes import RECIPES, apply
from core.config.source import ConfigSource
from core.data.generate import Assistant, write_assistant
from core.environment.doctor import last_report, run_examination
from core.environment.report import Status
from core.errors import DanluError, JobError
from core.files import read_json
from core.i18n import catalog
from core.models.embedded import NAME
from core.project import Project, create_project
from core.runs.directory import RunDirectory
from core.runs.job import SilentProgress
from core.runs.launch import start_job
from core.runs.metrics import MetricsReader
from core.runs.progress import recent_loss
from core.runs.request import TrainRequest
from core.runs.state import Phase, read_status
from core.runs.train import start_training
from core.xtuner.catalogue import search

ASSISTANT: Final = "Danlu"
AUTHOR: Final = "Lin"
QUESTION: Final = "Who are you?"
CONFIG: Final = "internlm2_1_8b_qlora_alpaca_e3"
LIMIT_SECONDS: Final = 360.0
"""The journey on 2 CPU cores, 40 steps of 256 tokens, after set-up."""
_STEP_LIMIT_SECONDS: Final = 1200.0


@dataclass
class Report:
    """What was done, how long it took, what came of it."""

    steps: list[tuple[str, float, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what is put into the list is its line in the report."""
        started, said = time.monotonic(), list[str]()
        print(f"  {name} …", flush=True)
        yield said
        self.steps.append((name, time.monotonic() - started, " ".join(said)))

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self.steps)

    def __str__(self) -> str:
        lines = [f"  {name:<12} {seconds:7.1f} s  {said}" for name, seconds, said in self.steps]
        return "\n".join([*lines, f"  {'total':<12} {self.seconds:7.1f} s"])


def journey(home: Path, *, rows: int = 150, steps: int = 40) -> Report:
    """Go through all steps in a new project of `home`. Raises DanluError where the app would show one."""
    report = Report()
    with report.step("project") as said:
        project = create_project(home, f"demo_{time.strftime('%Y%m%d_%H%M%S')}")
        said.append(str(project.root))
    with report.step("environment") as said:
        run_examination(sys.executable, str(project.root), SilentProgress())
        examined = last_report(project.root)
        assert examined is not None  # it was just written
        said.append(
            f"{examined.count(Status.GREEN)} green, {examined.count(Status.AMBER)} amber, {examined.count(Status.RED)} red"
        )
        report.facts["environment_red"] = examined.count(Status.RED)
    with report.step("model") as said:
        model = project.model / NAME
        arguments = {"target": str(model)}
        wait(
            start_job(
                project, "core.models.embedded:write_embedded_model", kind="dequantize", title=NAME, arguments=arguments
            )
        )
        said.append(model.name)
    with report.step("data") as said:
        data = write_assistant(project, Assistant(name=ASSISTANT, author=AUTHOR, language="en", rows=rows))
        said.append(f"{data.name}, {rows} rows")
    with report.step("config") as said:
        config = write_config(project, model, data, steps)
        said.append(config.name)
    with report.step("train") as said:
        run = start_training(project, TrainRequest(config=config, name="demo"))
        wait(run)
        metrics = MetricsReader(run.metrics_file).refresh()
        first, last = recent_loss(metrics, until=1), recent_loss(metrics)
        report.facts |= {"steps": len(metrics), "first_loss": first, "last_loss": last}
        said.append(f"{len(metrics)} steps, loss {_figure(first)} → {_figure(last)} (10-step mean)")
    with report.step("merge") as said:
        checkpoint = newest_complete(list_checkpoints(run.path))
        if checkpoint is None:
            raise JobError("demo.no_checkpoint", path=str(run.path))
        job = start_delivery(project, checkpoint.path, base_model=None, dtype="keep", merge=True, verify=True)
        wait(job)
        result = read_json(job.result_file)
        report.facts["verified"] = bool(result["verified"]["passed"])
        said.append(
            f"{checkpoint.name} → {Path(result['model']).relative_to(project.root)}, verified: {report.facts['verified']}"
        )
    with report.step("chat") as said:
        report.facts["answer"] = ask(project, Path(result["model"]), QUESTION)
        said.append(f"{QUESTION} — {report.facts['answer']}")
    return report


def _figure(loss: float | None) -> str:
    return "no number" if loss is None else f"{loss:.3f}"


def write_config(project: Project, model: Path, data: Path, steps: int) -> Path:
    """The guide's chapter 1.3 and 1.4: copy XTuner's config, apply the recipe, then what a short run on this machine needs."""
    entry = next(entry for entry in search(CONFIG) if entry.name == CONFIG)
    copied = copy_config(entry, project)
    source = apply(ConfigSource(read_config(copied.path)), RECIPES["first_try"](read_model(model), read_data(data)))
    machine = read_machine(project)
    if not machine.gpu_count:
        source = set_method(source, "lora")
    for path, value in (
        ("save_steps", steps),
        ("evaluation_freq", steps),
        ("evaluation_inputs", [QUESTION]),
        ("custom_hooks[EvaluateChatHook].max_new_tokens", 24),
    ):
        source = source.set(path, value)
    source = fix_all(source, Surroundings(machine))
    return save_config(project, replace(open_config(project, copied.name), text=source.text)).path


def wait(run: RunDirectory) -> None:
    """Wait for a run to end. Raises its own explained error, or JobError with the path of its log."""
    deadline = time.monotonic() + _STEP_LIMIT_SECONDS
    while (status := read_status(run)).phase.is_active:
        if time.monotonic() > deadline:
            raise JobError("demo.too_slow", path=str(run.log_file), seconds=_STEP_LIMIT_SECONDS)
        time.sleep(0.2)
    if status.phase is Phase.FINISHED:
        return
    if run.error_file.exists():
        raise DanluError.from_json(read_json(run.error_file))
    raise JobError("demo.failed", path=str(run.log_file), phase=str(status.phase))


def ask(project: Project, model: Path, question: str) -> str:
    """Start a worker for `model`, ask it one question greedily, end it."""
    run = start_worker(project, model)
    try:
        deadline = time.monotonic() + _STEP_LIMIT_SECONDS
        while read_worker(run).served is None:
            if not read_status(run).phase.is_active or time.monotonic() > deadline:
                wait(run)
                raise JobError("demo.failed", path=str(run.log_file), phase="ended")
            time.sleep(0.2)
        reply = Reply()
        settings = {"temperature": 0.0, "max_tokens": 48}
        return "".join(
            stream_chat(read_worker(run).endpoint(), [{"role": "user", "content": question}], settings, reply)
        )
    finally:
        stop_worker(run)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.demo", description=__doc__)
    parser.add_argument("--home", type=Path, help="keep the project in this folder (default: a temporary one)")
    arguments = parser.parse_args(argv)
    print("Danlu: the whole journey on this machine", flush=True)
    with tempfile.TemporaryDirectory(prefix="danlu_demo_") as temporary:
        try:
            report = journey(arguments.home or Path(temporary))
        except DanluError as error:
            print("\n".join(catalog("en").explain(error)), file=sys.stderr)
            return 1
    print(report)
    held = {
        "the environment has no red line": report.facts["environment_red"] == 0,
        "the merged model is verified": report.facts["verified"],
        f"the merged model answers as {ASSISTANT}": ASSISTANT in report.facts["answer"],
        f"under {LIMIT_SECONDS / 60:.0f} minutes": report.seconds < LIMIT_SECONDS,
    }
    for what, is_true in held.items():
        print(f"  {'✓' if is_true else '✗'} {what}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
