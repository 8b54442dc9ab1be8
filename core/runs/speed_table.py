"""What was measured for a model, card, length and method: remembered in a project, and applied to a config on consent."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from core.config.edits import method_of
from core.config.source import ConfigSource
from core.errors import InputError
from core.files import read_json, write_json
from core.launchers.local import list_gpus
from core.models.inspect import fingerprint
from core.project import Project

_CPU: Final = "CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to train with the same effective batch."""

    batch_size: int
    accumulation: int
    checkpointing: bool
    speed: str | dict[str, Any]
    """What the speed layer is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A setting with what came of it."""

    setting: Setting
    tokens_per_second: float | None
    """None: it failed."""
    memory_bytes: int | None = None
    parts: tuple[str, ...] = ()
    """Parts of the speed layer that were in use."""
    tokens_per_pass: int | None = None
    measured_seconds: float = 0.0
    failure: str | None = None
    """An error code of core, or the line that names a defect."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Measured":
        return cls(**{**value, "setting": Setting(**value["setting"]), "parts": tuple(value.get("parts") or ())})


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured for a model, card, length and method."""

    rows: tuple[Measured, ...]
    at: str
    applied: bool

    @property
    def stock(self) -> Measured | None:
        """The config as it is, without the speed layer."""
        return self.rows[0] if self.rows and self.rows[0].setting.speed == "off" else None

    @property
    def best(self) -> Measured | None:
        return max(
            (row for row in self.rows if row.tokens_per_second),
            key=lambda row: row.tokens_per_second or 0,
            default=None,
        )


def setting_of(source: ConfigSource) -> Setting:
    """The config as it is, without the speed layer."""
    return Setting(
        batch_size=int(source.effective("batch_size", 1)),
        accumulation=int(source.effective("accumulative_counts", 1)),
        checkpointing=bool(source.effective("model.use_activation_checkpointing", True)),
        speed="off",
    )


def key_of(project: Project, source: ConfigSource, *, card: str) -> str:
    """What a table holds for. Raises InputError if the config names no local model."""
    folder = model_folder(project, source)
    batch = setting_of(source)
    effective = batch.batch_size * batch.accumulation
    parts = (fingerprint(folder), card, source.effective("max_length", 0), method_of(source), effective)
    return " | ".join(str(part) for part in parts)


def card_name(gpu: str | None) -> str:
    """Name of the GPU with this UUID or index; `CPU` for none."""
    return next((card.name for card in list_gpus() if gpu in (card.uuid, str(card.index))), gpu or _CPU)


def remembered(project: Project, source: ConfigSource, *, gpu: str | None) -> Table | None:
    """What was measured before for this config's model, length and method on this card."""
    try:
        value = read_tables(project).get(key_of(project, source, card=card_name(gpu)))
    except InputError:
        return None
    if value is None:
        return None
    return Table(tuple(Measured.from_json(row) for row in value["rows"]), value["at"], bool(value["applied"]))


@dataclass(frozen=True, slots=True)
class Gain:
    """What the speed layer was measured to bring on this card. Rates in tokens a second."""

    stock: float
    fast: float
    parts: Mapping[str, float]
    """Rate with a part over the rate without it, for parts that were measured both ways and nothing else changed."""
    at: str


def measured_gain(
    project: Project, source: ConfigSource, speed: str | Mapping[str, Any], *, gpu: str | None
) -> Gain | None:
    """For a run of this config with this wish for the speed layer; None unless just that was measured on this card."""
    table = remembered(project, source, gpu=gpu)
    if table is None or table.stock is None or not table.stock.tokens_per_second:
        return None
    asked = replace(setting_of(source), speed=dict(speed) if isinstance(speed, Mapping) else speed)
    row = next((row for row in table.rows if row.setting == asked and row.tokens_per_second), None)
    if row is None or row.tokens_per_second is None:
        return None
    parts = {}
    for other in table.rows:
        without = set(row.parts) - set(other.parts)
        is_one_less = len(without) == 1 and set(other.parts) < set(row.parts) and _is_alike(row.setting, other.setting)
        if is_one_less and other.tokens_per_second:
            parts[without.pop()] = row.tokens_per_second / other.tokens_per_second
    return Gain(table.stock.tokens_per_second, row.tokens_per_second, parts, table.at)


def _is_alike(one: Setting, other: Setting) -> bool:
    return replace(one, speed="") == replace(other, speed="")


def apply(source: ConfigSource, best: Setting) -> ConfigSource:
    """The config with this micro-batch, accumulation and checkpointing. Its effective batch, schedule and seed stay as they are.

    What counts micro-steps (saving, sample answers) is scaled, so that it happens after as many samples as before.
    """
    now = setting_of(source)
    written = int(source.get("accumulative_counts", now.accumulation))
    factor = max(
        1, now.accumulation // max(1, written)
    )  # `accumulative_counts *= sequence_parallel_size` goes on to hold
    edited = source
    if best.batch_size != now.batch_size:
        edited = edited.set("batch_size", best.batch_size).set("accumulative_counts", best.accumulation // factor)
        for name in ("save_steps", "evaluation_freq"):
            steps = source.get(name, None)
            if isinstance(steps, int):
                edited = edited.set(name, max(1, round(steps * now.batch_size / best.batch_size)))
    if best.checkpointing != now.checkpointing:
        edited = edited.set("model.use_activation_checkpointing", best.checkpointing)
    return edited


def remember_consent(project: Project, source: ConfigSource, *, gpu: str | None) -> None:
    """Launches of this config on this card use the best setting from now on."""
    key = key_of(project, source, card=card_name(gpu))
    if table := read_tables(project).get(key):
        remember(project, key, {**table, "applied": True})


def model_folder(project: Project, source: ConfigSource) -> Path:
    named = source.get("model.llm.pretrained_model_name_or_path", None)
    folder = project.root / named if isinstance(named, str) and named else None
    if folder is None or not (folder / "config.json").is_file():
        raise InputError("speed.no_local_model", path=str(named or ""))
    return folder


def remember(project: Project, key: str, table: Mapping[str, Any]) -> None:
    write_json(_file(project), {**read_tables(project), key: table})


def _file(project: Project) -> Path:
    return project.private / "speed.json"


def read_tables(project: Project) -> dict[str, Any]:
    """A file that is missing or broken holds nothing."""
    try:
        value = read_json(_file(project)) if _file(project).is_file() else {}
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}
