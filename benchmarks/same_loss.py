"""Real weights on the CPU: the embedded SmolLM2 learns an identity, stock and with the speed layer, to the same final loss.

Without dropout, whose masks differ on the two sides. Runs what a person's launch runs, and says how fast each side was.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.result import Result

STEPS: Final = 20
LAST: Final = 4
"""Steps whose mean loss counts as final."""
_SEEING: Final = {"parts": ["fast_pass", "grouped_micro_batches", "selective_recomputation"]}
"""As stock XTuner computes: packed samples see each other."""
_SIDES: Final[dict[str, Any]] = {"stock": "off", "fast": _SEEING, "fast_apart": "auto"}


def run() -> Result:
    figures: dict[str, float | int | str | None] = {}
    with tempfile.TemporaryDirectory(prefix="danlu_same_loss_") as folder:
        found = train(Path(folder))
    final = {side: statistics.fmean(line["loss"] for line in lines[-LAST:]) for side, lines in found.items()}
    for side, lines in found.items():
        figures[f"{side}_final_loss"] = round(final[side], 5)
        seconds = statistics.median(line["step_seconds"] for line in lines)
        figures[f"{side}_tokens_per_second"] = round(statistics.median(line["tokens"] for line in lines) / seconds, 1)
    figures["steps"] = len(found["stock"])
    figures["difference_percent"] = round(100 * abs(final["fast"] / final["stock"] - 1), 3)
    steps = zip(found["stock"], found["fast"], strict=True)
    figures["greatest_step_difference"] = round(max(abs(one["loss"] - other["loss"]) for one, other in steps), 6)
    return Result(figures, {"difference_percent": ("<=", 2)})


def train(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics lines of each side, trained one after the other on the same data in the same order."""
    from core.config.source import ConfigSource
    from core.data.generate import Assistant, write_assistant
    from core.demo import wait, write_config
    from core.files import write_text
    from core.models.embedded import NAME, write_embedded_model
    from core.project import create_project
    from core.runs.job import SilentProgress
    from core.runs.request import TrainRequest
    from core.runs.train import start_training

    project = create_project(folder, "same_loss")
    write_embedded_model(target=str(project.model / NAME), progress=SilentProgress())
    data = write_assistant(project, Assistant(name="Danlu", author="Lin", language="en", rows=80))
    config = write_config(project, project.model / NAME, data, STEPS)
    source = ConfigSource(config.read_text(encoding="utf-8")).set("model.lora.lora_dropout", 0.0)
    write_text(config, source.text)
    found = {}
    for side, speed in _SIDES.items():
        run_directory = start_training(project, TrainRequest(config=config, name=side, speed=speed))
        wait(run_directory)
        lines = run_directory.metrics_file.read_text(encoding="utf-8").splitlines()
        found[side] = [json.loads(line) for line in lines[:STEPS]]
    return found
