"""What a checkpoint was trained with, and where that differs from a config. Reads run.json and config text; loads no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.checkpoints.inspect import CheckpointCard
from core.checkpoints.weights import open_checkpoint
from core.config import deepspeed
from core.config.edits import data_files, method_of
from core.config.source import ConfigSource
from core.config.values import Code
from core.errors import DanluError
from core.messages import Message, message
from core.project import Project
from core.runs.directory import RunDirectory

_ADAPTER: Final = ("r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora", "bias")
_PLACES: Final = {
    "max_length": ("max_length", "train_dataset.max_length"),
    "pack_to_max_length": ("pack_to_max_length", "train_dataset.pack_to_max_length"),
    "batch_size": ("batch_size", "train_dataloader.batch_size"),
}
"""What decides which tokens an iteration sees → where configs have it."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The run that wrote a checkpoint, as far as it is known."""

    card: CheckpointCard
    details: Mapping[str, Any] = field(default_factory=dict)
    """Of its run.json; empty for a run that the app did not start."""
    source: ConfigSource | None = None
    """The config it trained with."""

    @property
    def world_size(self) -> int:
        """A plain file does not say it; its run.json does."""
        if self.card.is_folder and self.card.world_size:
            return self.card.world_size
        return int(self.details.get("world_size") or 1)

    def value(self, *places: str) -> Any:
        """A plain value of the config at the first of `places` that it has; None if there is none."""
        return plain_value(self.source, *places) if self.source else None


def read_origin(card: CheckpointCard) -> Origin:
    """From the run's own folder, else from the config text that mmengine keeps in the checkpoint."""
    run = RunDirectory(card.path.parent)
    details: Mapping[str, Any] = {}
    texts: list[str] = []
    try:
        details = run.spec().details
        name = f"{details['config']['name']}.py"
        texts.append((run.source / name).read_text(encoding="utf-8"))
    except (DanluError, KeyError, OSError, UnicodeDecodeError):
        kept = open_checkpoint(card.path).meta.get("cfg")
        texts += [kept] if isinstance(kept, str) else []
    for text in texts:
        try:
            return Origin(card, details, ConfigSource(text))
        except DanluError:
            continue
    return Origin(card, details)


@dataclass(frozen=True, slots=True)
class Preset:
    """The DeepSpeed setting to go on with, and why this one."""

    name: str
    """As `core.config.deepspeed.find` takes it."""
    why: Message


def deepspeed_of(project: Project, card: CheckpointCard) -> Preset | None:
    """The setting that the run of a checkpoint used itself; None without DeepSpeed.

    It is the saved one if that still says the same, else the copy in the run's folder. A run that kept no JSON, as one made by
    hand, leaves only the stage of its checkpoint.
    """
    if not card.is_folder:
        return None
    run = RunDirectory(card.path.parent)
    try:
        kept = run.spec().details.get("deepspeed_config") or {}
    except DanluError:
        kept = {}
    name, text = str(kept.get("name", "")), kept.get("text")
    if isinstance(text, str):
        if same := deepspeed.same_text(project, name, text):
            return Preset(same, message("resume.deepspeed.same", run=run.id, name=same))
        copy = deepspeed.name_of_copy(project, run.path)
        if deepspeed.same_text(project, copy, text) == copy:
            return Preset(copy, message("resume.deepspeed.copy", run=run.id, name=name))
    stage = card.stage or 2
    return Preset(f"deepspeed_zero{stage}", message("resume.deepspeed.stage", run=run.id, stage=stage))


def plain_value(source: ConfigSource, *places: str) -> Any:
    """The first of `places` that `source` has; None if it has none, or only an expression."""
    for place in places:
        if source.has(place):
            value = source.effective(place)
            return None if isinstance(value, Code) else value
    return None


def differing_weights(origin: Origin, source: ConfigSource, base_model: Mapping[str, Any]) -> list[str]:
    """Entries of model and adapter that differ, as `name: saved → chosen`. What is not known on one side is not compared."""
    found = [*_model(origin, base_model), *_method(origin, source)]
    for name in _ADAPTER:
        saved, chosen = (plain_value(each, f"model.lora.{name}") if each else None for each in (origin.source, source))
        if name == "r":
            saved = origin.card.lora_rank or saved
        found += _differs(f"lora.{name}", saved, chosen)
    return found


def differing_data(origin: Origin, source: ConfigSource, details: Mapping[str, Any]) -> list[str]:
    """Entries that decide which tokens an iteration sees, as `name: saved → chosen`."""
    found: list[str] = []
    saved, chosen = origin.details.get("data"), details["data"]
    if saved:
        if [entry["sha256"] for entry in saved] != [entry["sha256"] for entry in chosen]:
            found.append(f"data: {_names(saved)} → {_names(chosen)}")
    elif origin.source:
        names = [Path(file).name for file in data_files(origin.source)]
        found += _differs("data", names, [Path(entry["path"]).name for entry in chosen]) if names else []
    if origin.details.get("prompt_template"):
        same = origin.details["prompt_template"] == details["prompt_template"]
        found += [] if same else ["prompt_template"]
    for name, places in _PLACES.items():
        found += _differs(name, origin.value(*places), plain_value(source, *places))
    return found


def ignored_settings(origin: Origin, source: ConfigSource) -> list[str]:
    """Settings changed in the config that the optimizer's and scheduler's saved state overrides."""
    found: list[str] = []
    for name, places in {
        "lr": ("lr", "optim_wrapper.optimizer.lr"),
        "betas": ("betas", "optim_wrapper.optimizer.betas"),
        "weight_decay": ("weight_decay", "optim_wrapper.optimizer.weight_decay"),
        "warmup_ratio": ("warmup_ratio",),
    }.items():
        found += _differs(name, origin.value(*places), plain_value(source, *places))
    return found


def _model(origin: Origin, base_model: Mapping[str, Any]) -> list[str]:
    saved = origin.details.get("base_model") or {}
    if saved.get("fingerprint") and base_model.get("fingerprint"):
        same = saved["fingerprint"] == base_model["fingerprint"]
        return [] if same else [f"base_model: {Path(saved['path']).name} → {Path(base_model['path']).name}"]
    named = origin.value("model.llm.pretrained_model_name_or_path")
    if not isinstance(named, str):
        return []
    return _differs("base_model", Path(named).name, Path(base_model["path"]).name)


def _method(origin: Origin, source: ConfigSource) -> list[str]:
    """LoRA and QLoRA train the same adapter; a full fine-tune and an adapter have nothing in common."""
    chosen = method_of(source)
    saved = "lora" if origin.card.is_adapter else "full"
    return [] if (saved == "full") == (chosen == "full") else [f"method: {saved} → {chosen}"]


def _differs(name: str, saved: Any, chosen: Any) -> list[str]:
    if saved is None or chosen is None or _comparable(saved) == _comparable(chosen):
        return []
    return [f"{name}: {saved} → {chosen}"]


def _comparable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list | tuple | set) else value


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{Path(entry['path']).name} ({str(entry['sha256'])[:8]})" for entry in entries)
