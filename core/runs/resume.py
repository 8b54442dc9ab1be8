"""Going on from a checkpoint: what fits, what has to be written before the start, and what will happen.

Knows checkpoints and configs; knows no widget, loads no weights, starts nothing. Writing is `core.runs.carry_over`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from core.checkpoints.counters import check_counters, rescaled_accumulation
from core.checkpoints.inspect import CheckpointCard, inspect_checkpoint
from core.checkpoints.plain_layout import PlainFile
from core.checkpoints.trust import scan
from core.config.source import ConfigSource
from core.errors import InputError
from core.messages import Message, message
from core.runs.origin import (
    Origin,
    differing_data,
    differing_weights,
    ignored_settings,
    plain_value,
    read_origin,
)

WARM_START: Final = "warm_start.pth"
"""Name of the adapter a run begins with, in its folder."""
WARM_MODEL: Final = "warm_start"
"""Name of the whole model that a full fine-tune begins with, in its folder."""
_ACCUMULATION: Final = ("accumulative_counts", "optim_wrapper.accumulative_counts")
_EPOCHS: Final = ("max_epochs", "train_cfg.max_epochs")
_ITERATIONS: Final[tuple[str, ...]] = ("train_cfg.max_iters",)
_INTERVALS: Final[tuple[tuple[str, ...], ...]] = (
    ("save_steps", "default_hooks.checkpoint.interval"),
    ("evaluation_freq", "custom_hooks[EvaluateChatHook].every_n_iters"),
    ("validation_freq", "validation.every_n_iters"),
)
"""Counted in iterations, so they scale with them."""


class Mode(StrEnum):
    """How a new run begins with a checkpoint."""

    EXACT = "exact"
    """Weights, optimizer, schedule, counters, place in the data: the same curve goes on."""
    WEIGHTS = "weights"
    """The weights only: new optimizer, new schedule, from iteration 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePlan:
    """What will happen to a checkpoint. Stage 0: no DeepSpeed."""

    checkpoint: Path
    mode: Mode
    from_world_size: int
    to_world_size: int
    from_stage: int
    to_stage: int
    from_iteration: int
    to_iteration: int
    from_accumulation: int
    to_accumulation: int
    from_epochs: float | None
    to_epochs: float | None
    size_bytes: int
    edits: dict[str, Any] = field(default_factory=dict)
    """Places of the run's own copy of the config → values."""
    ignored: tuple[str, ...] = ()
    """Changes of the config that the saved state overrides, as `name: saved → chosen`."""
    is_adapter: bool = True

    @property
    def stretch(self) -> Fraction:
        """Length of the new schedule to the old one."""
        if not self.from_epochs or not self.to_epochs or self.mode is Mode.WEIGHTS:
            return Fraction(1)
        return Fraction(self.to_epochs) / Fraction(self.from_epochs)

    @property
    def is_written_anew(self) -> bool:
        """Whether a checkpoint must be made from this one before training can start."""
        is_cut_anew = self.from_world_size != self.to_world_size or _form(self.from_stage) != _form(self.to_stage)
        return self.mode is Mode.WEIGHTS or is_cut_anew or self.stretch != 1

    @property
    def written_name(self) -> str:
        """File or folder that is written into the new run's directory."""
        if self.mode is Mode.WEIGHTS:
            return WARM_START if self.is_adapter else WARM_MODEL
        return f"iter_{self.to_iteration}.pth"

    def to_json(self) -> dict[str, Any]:
        plain = {**asdict(self), "checkpoint": str(self.checkpoint)}
        happens = [said.to_json() for said in explain(self)]
        return {**plain, "is_written_anew": self.is_written_anew, "written_name": self.written_name, "happens": happens}


def plan_resume(
    checkpoint: Path,
    source: ConfigSource,
    details: Mapping[str, Any],
    *,
    mode: Mode,
    world_size: int,
    deepspeed: str | None,
    extra_epochs: float = 0,
) -> ResumePlan:
    """What will happen if a run with this config goes on from `checkpoint`. `details`: base_model, data, prompt_template.

    Raises InputError for a checkpoint that is missing, cut, not to be trusted, of another model, data set or LoRA shape, or
    that cannot be carried over to `world_size` ranks and this DeepSpeed setting.
    """
    if not checkpoint.exists():
        raise InputError("train.checkpoint_missing", path=str(checkpoint))
    card = inspect_checkpoint(checkpoint)
    if card.problem is not None:
        raise card.problem
    scan(checkpoint)
    origin = read_origin(card)
    _check_origin(origin, source, details, mode)
    if mode is Mode.WEIGHTS:
        return _weights_plan(origin, source, world_size, deepspeed)
    return _exact_plan(origin, source, world_size, deepspeed, extra_epochs)


def start_edits(resumed: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Places of the new run's config → values, so that it begins with the weights in its own `folder`. `resumed`: a plan as JSON."""
    if resumed["mode"] != Mode.WEIGHTS:
        return {}
    # XTuner loads `peft_model` into the fresh adapter; a whole model takes the place of the base model.
    place = "model.peft_model" if resumed["is_adapter"] else "model.llm.pretrained_model_name_or_path"
    return {place: str(folder / resumed["written_name"])}


def edited(source: ConfigSource, edits: Mapping[str, Any]) -> ConfigSource:
    """The config with the plan's changes."""
    for place, value in edits.items():
        source = source.set(place, value)
    return source


def stage_of(deepspeed: str | None) -> int:
    """ZeRO stage of one of XTuner's DeepSpeed configs; 0 without."""
    return int(deepspeed.removeprefix("deepspeed_zero")[0]) if deepspeed else 0


def explain(plan: ResumePlan) -> list[Message]:
    """What will happen, one sentence each."""
    if plan.mode is Mode.WEIGHTS:
        key = "weights" if plan.is_adapter else "model"
        said = [message(f"resume.happens.{key}", iteration=plan.from_iteration)]
        return [*said, message("resume.happens.new_folder")]
    said = [message("resume.happens.exact", iteration=plan.to_iteration)]
    if plan.from_world_size != plan.to_world_size:
        is_partitioned = plan.from_stage or plan.to_stage
        key = "resume.happens.ranks" if is_partitioned else "resume.happens.plain_ranks"
        said.append(message(key, old=plan.from_world_size, new=plan.to_world_size))
        said.append(message("resume.happens.counters", old=plan.from_iteration, new=plan.to_iteration))
    if _form(plan.from_stage) != _form(plan.to_stage):
        key = "to_deepspeed" if not plan.from_stage else "from_deepspeed" if not plan.to_stage else "stage"
        said.append(message(f"resume.happens.{key}", old=plan.from_stage, new=plan.to_stage))
    if plan.from_accumulation != plan.to_accumulation:
        said.append(message("resume.happens.accumulation", old=plan.from_accumulation, new=plan.to_accumulation))
    if plan.stretch != 1:
        said.append(message("resume.happens.longer", old=plan.from_epochs, new=plan.to_epochs))
    if plan.from_iteration % plan.from_accumulation:
        said.append(message("resume.happens.half_window", accumulation=plan.from_accumulation))
    if plan.ignored:
        said.append(message("resume.happens.ignored", entries="; ".join(plan.ignored)))
    return [*said, message("resume.happens.new_folder")]


def _check_origin(origin: Origin, source: ConfigSource, details: Mapping[str, Any], mode: Mode) -> None:
    differing = differing_weights(origin, source, details["base_model"])
    if mode is Mode.EXACT:
        differing += differing_data(origin, source, details)
        if not origin.card.has_optimizer:
            raise InputError("train.checkpoint_without_optimizer", path=str(origin.card.path))
    if differing:
        code = "resume.other_training" if mode is Mode.EXACT else "resume.other_weights"
        raise InputError(code, path=str(origin.card.path), entries="; ".join(differing))


def _weights_plan(origin: Origin, source: ConfigSource, world_size: int, deepspeed: str | None) -> ResumePlan:
    card = origin.card
    accumulation = int(plain_value(source, *_ACCUMULATION) or 1)
    return ResumePlan(
        checkpoint=card.path,
        mode=Mode.WEIGHTS,
        from_world_size=origin.world_size,
        to_world_size=world_size,
        from_stage=card.stage or 0,
        to_stage=stage_of(deepspeed),
        from_iteration=card.iteration or 0,
        to_iteration=0,
        from_accumulation=accumulation,
        to_accumulation=accumulation,
        from_epochs=None,
        to_epochs=None,
        size_bytes=card.size_bytes,
        is_adapter=bool(card.is_adapter),
    )


def _exact_plan(
    origin: Origin, source: ConfigSource, world_size: int, deepspeed: str | None, extra_epochs: float
) -> ResumePlan:
    card, stage = origin.card, stage_of(deepspeed)
    _check_form(card, origin.world_size, stage)
    old, iteration = origin.world_size, card.iteration or 0
    accumulation = int(origin.details.get("accumulative_counts") or origin.value(*_ACCUMULATION) or 1)
    if old != world_size:
        if int(plain_value(source, "sequence_parallel_size") or 1) > 1:
            raise InputError("resume.sequence_parallel")
        check_counters(iteration, old, world_size, accumulation)
    scaled = rescaled_accumulation(accumulation, old, world_size)
    epochs = origin.value(*_EPOCHS)
    if extra_epochs and epochs is None:
        raise InputError("resume.unknown_epochs", path=str(card.path))
    longer = None if epochs is None else epochs + extra_epochs
    return ResumePlan(
        checkpoint=card.path,
        mode=Mode.EXACT,
        from_world_size=old,
        to_world_size=world_size,
        from_stage=card.stage or 0,
        to_stage=stage,
        from_iteration=iteration,
        to_iteration=iteration * old // world_size,
        from_accumulation=accumulation,
        to_accumulation=scaled,
        from_epochs=epochs,
        to_epochs=longer,
        size_bytes=card.size_bytes,
        edits=_edits(origin, source, scaled, Fraction(old, world_size), longer),
        ignored=tuple(ignored_settings(origin, source)),
        is_adapter=bool(card.is_adapter),
    )


def _form(stage: int) -> int:
    """Which of the three forms: one file, ZeRO-1 and 2 (which read each other's), ZeRO-3."""
    return (0, 1, 1, 3)[stage]


def _check_form(card: CheckpointCard, world_size: int, stage: int) -> None:
    """A plain file that becomes a DeepSpeed folder must say which optimizer state belongs to which weight."""
    if not card.is_folder and stage:
        PlainFile(card.path, world_size)


def _edits(
    origin: Origin, source: ConfigSource, accumulation: int, factor: Fraction, epochs: float | None
) -> dict[str, Any]:
    """What the new run's config must say so that the global batch, the epochs and the moments of saving stay the same."""
    wanted: dict[tuple[str, ...], Any] = {_ACCUMULATION: accumulation, _EPOCHS: epochs}
    for places in (*_INTERVALS, _ITERATIONS):
        base = origin.value(*places)
        if factor == 1 or not isinstance(base, int) or base < 1:
            continue
        wanted[places] = int(base * factor)
        if places != _ITERATIONS:  # Saved inside an accumulation window, a checkpoint would lack its gradients.
            wanted[places] = max(accumulation, round(base * factor / accumulation) * accumulation)
    edits: dict[str, Any] = {}
    for places, value in wanted.items():
        place = next((place for place in places if source.has(place)), None)
        if place and value is not None and plain_value(source, place) != value:
            edits[place] = value
    return edits
