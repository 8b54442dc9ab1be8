"""The guide's edits as recipes: each step is an edit with its explanation, to be read line by line and applied at once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.config.edits import set_data_path, set_map_fn, set_map_processes, set_model, set_template
from core.config.facts import DataFacts, ModelFacts
from core.config.source import ConfigSource, diff
from core.messages import Message, message

Edit = Callable[[ConfigSource], ConfigSource]
QUESTIONS: Final = ("请你介绍一下你自己", "Please introduce yourself")


@dataclass(frozen=True, slots=True)
class Step:
    """One edit and why it is made."""

    why: Message
    edit: Edit


@dataclass(frozen=True, slots=True)
class Shown:
    """A step as it would change a config now."""

    why: Message
    diff: str
    """Unified diff; empty if the config has it already."""


def first_try(model: ModelFacts | None, data: DataFacts | None) -> list[Step]:
    """Five minutes on the embedded model and the personal assistant, on a CPU too: short texts, a bold rate, an update every step."""
    return [
        *_model_steps(model),
        *_set("max_length", 256),
        *_set("max_epochs", 2),
        *_set("accumulative_counts", 1, why="each_step"),
        *_set("lr", 1e-3),
        *_set("save_steps", 20, why="save_often"),
        *_set("save_total_limit", 3),
        *_set("evaluation_freq", 20),
        *_set("evaluation_inputs", list(QUESTIONS)),
        *_data_steps(data),
    ]


def guide_small(model: ModelFacts | None, data: DataFacts | None) -> list[Step]:
    """Chapter 1.4 of the guide, for InternLM2-1.8B: model, data, shorter texts, two epochs, more checkpoints, own questions."""
    return [
        *_model_steps(model),
        *_set("max_length", 1024),
        *_set("max_epochs", 2),
        *_set("save_total_limit", 3),
        *_set("evaluation_freq", 300),
        *_set("evaluation_inputs", list(QUESTIONS)),
        *_data_steps(data),
    ]


def guide_large(model: ModelFacts | None, data: DataFacts | None) -> list[Step]:
    """Chapters 2.4 and 3 of the guide, for InternLM2-20B with QLoRA on two A100 80 GB."""
    return [
        *_model_steps(model),
        *_set("max_length", 4096),
        *_set("pack_to_max_length", True),
        *_set("sequence_parallel_size", 1),
        *_set("batch_size", 4),
        *_set("accumulative_counts", 16),
        *_set("dataloader_num_workers", 0),
        *_set("max_epochs", 50),
        *_set("save_total_limit", 3),
        *_set("save_steps", 480),
        *_set("evaluation_freq", 300),
        *_set("evaluation_inputs", list(QUESTIONS)),
        *_data_steps(data),
    ]


RECIPES: Final[dict[str, Callable[[ModelFacts | None, DataFacts | None], list[Step]]]] = {
    "first_try": first_try,
    "guide_small": guide_small,
    "guide_large": guide_large,
}


def show(source: ConfigSource, steps: list[Step]) -> list[Shown]:
    """What each step changes, one after the other. Raises what the edits raise."""
    shown = []
    for step in steps:
        edited = step.edit(source)
        shown.append(Shown(step.why, diff(source.text, edited.text, context_lines=0)))
        source = edited
    return shown


def apply(source: ConfigSource, steps: list[Step]) -> ConfigSource:
    """The config with all steps done. Raises what the edits raise; then nothing is changed."""
    for step in steps:
        source = step.edit(source)
    return source


def _set(path: str, value: Any, why: str | None = None) -> list[Step]:
    """Only where the config has the place: not every one has each variable. `why`: key of the explanation if not the path."""
    shown = ", ".join(value) if isinstance(value, list) else value
    return [
        Step(
            message(f"config.recipe.{why or path}", value=shown),
            lambda source: source.set(path, value) if source.has(path) else source,
        )
    ]


def _model_steps(model: ModelFacts | None) -> list[Step]:
    if model is None:
        return []
    folder: Path = model.path
    steps = [Step(message("config.recipe.model", path=folder.name), lambda source: set_model(source, folder))]
    template = model.template
    if template is not None:
        steps.append(
            Step(message("config.recipe.template", template=template), lambda source: set_template(source, template))
        )
    return steps


def _data_steps(data: DataFacts | None) -> list[Step]:
    if data is None:
        return []
    return [
        Step(message("config.recipe.data_path", path=data.path.name), lambda source: set_data_path(source, data.path)),
        Step(
            message("config.recipe.map_fn", map_fn=data.map_fn or "None", format=str(data.format)),
            lambda source: set_map_fn(source, data),
        ),
        Step(message("config.recipe.map_num_proc", rows=data.rows), lambda source: set_map_processes(source, data)),
    ]
