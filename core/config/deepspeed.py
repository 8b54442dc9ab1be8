"""DeepSpeed's JSON: XTuner's own, the project's own ones under a name, a run's copy, and what of it decides memory and checkpoints.

Reads and writes files; judges nothing (`core.config.checks_of_deepspeed`) and imports no DeepSpeed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.config.json_places import JsonObject, read_object
from core.errors import ConflictError, DanluError, InputError
from core.files import free_path, write_text
from core.project import Project
from core.xtuner.command import DEEPSPEED_CHOICES
from core.xtuner.templates import xtuner_folder

FOLDER: Final = "deepspeed"
"""In the project's config folder: `<name>.json`."""
RUN_FILE: Final = "source/deepspeed.json"
"""In a run's folder: the JSON as a person chose it."""
MAX_BYTES: Final = 256 * 1024
_NAME: Final = re.compile(r"[^\W_][\w.-]{0,63}", re.UNICODE)
_BUCKET: Final = 500_000_000
_LIVE: Final = 1_000_000_000
"""DeepSpeed's own defaults (runtime/zero/config.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """What of a DeepSpeed config decides how much memory a rank takes."""

    stage: int = 0
    offloads_optimizer: bool = False
    """Optimizer states lie in RAM (or on a disk)."""
    offloads_parameters: bool = False
    """So do the weights between their uses; stage 3 only."""
    bucket_elements: int = _BUCKET
    """`reduce_bucket_size`"""
    overlaps: bool = True
    """`overlap_comm`: with it, stages 1 and 2 hold two buckets."""
    live_elements: int = _LIVE
    """`stage3_max_live_parameters`"""

    @property
    def choice(self) -> str:
        """The name that says stage and offload, as XTuner names its own: `deepspeed_zero2_offload`."""
        return f"deepspeed_zero{self.stage}{'_offload' if self.offloads_optimizer else ''}"


@dataclass(frozen=True, slots=True)
class Setting:
    """A DeepSpeed config: one of XTuner's, one of the project's, or the copy that a run keeps."""

    name: str
    text: str
    json: JsonObject
    is_own: bool
    """Not one of XTuner's."""

    @property
    def zero(self) -> Zero:
        return read_zero(self.json.values)

    @property
    def is_saved(self) -> bool:
        """Under a name in the project, where it can be changed."""
        return self.is_own and not is_copy(self.name)

    def to_json(self) -> dict[str, Any]:
        """What run.json says."""
        return {"name": self.name, "is_own": self.is_own, "text": self.text}


def find(project: Project, name: str) -> Setting:
    """The setting of this name. Raises InputError `train.unknown_deepspeed`, or what read_object raises."""
    if name in DEEPSPEED_CHOICES:
        return Setting(name, xtuner_text(name), read_object(xtuner_text(name)), is_own=False)
    path = project.train / name if is_copy(name) else _path(project, name)
    if not path.is_file():
        known = [*DEEPSPEED_CHOICES, *list_own(project)]
        raise InputError("train.unknown_deepspeed", name=name, known=", ".join(known))
    text = _read(path)
    return Setting(name, text, read_object(text), is_own=True)


def name_of_copy(project: Project, run: Path) -> str:
    """What `find` calls the copy that the run in this folder keeps: its path, from the project's train folder if it lies there."""
    file = run / RUN_FILE
    return str(file.relative_to(project.train) if file.is_relative_to(project.train) else file)


def is_copy(name: str) -> bool:
    """Whether it names a run's copy; the name of a saved setting has no slash."""
    return name.endswith(f"/{RUN_FILE}")


def run_of_copy(name: str) -> str:
    """Id of the run whose copy this names."""
    return Path(name).parents[1].name


def same_text(project: Project, name: str, text: str) -> str | None:
    """The setting that says this today: the one of this name, else another saved one; None if none does."""
    for each in dict.fromkeys((name, *list_own(project))):
        try:
            if find(project, each).text == text:
                return each
        except DanluError:
            continue
    return None


def list_own(project: Project) -> list[str]:
    """Names of the project's own DeepSpeed configs."""
    return sorted(file.stem for file in (project.config / FOLDER).glob("*.json") if not file.name.startswith("."))


def save(project: Project, name: str, text: str, *, before: str | None = None) -> Path:
    """Keep `text` under a name. `before`: what the file held when editing began; None: a new name.

    The version before goes to `.danlu/versions/`. Raises InputError for a bad name, one of XTuner's, or text that is no JSON
    object; ConflictError if the name is taken or the file is no longer what editing began with.
    """
    if not _NAME.fullmatch(name):
        raise InputError("deepspeed.bad_name", name=name)
    if name == "none" or name in DEEPSPEED_CHOICES:
        raise InputError("deepspeed.name_of_xtuner", name=name)
    if len(text.encode()) > MAX_BYTES:
        raise InputError("deepspeed.too_large", limit_kib=MAX_BYTES // 1024)
    read_object(text)
    path = _path(project, name)
    if path.exists():
        current = _read(path)
        if before is None:
            raise ConflictError("deepspeed.name_taken", name=name)
        if current != before:
            raise ConflictError("deepspeed.changed_on_disk", name=name)
        if current != text:
            write_text(free_path(project.private / "versions" / path.name), current)
    write_text(path, text)
    return path


def remove(project: Project, name: str) -> None:
    """Forget one of the project's own; its text goes to `.danlu/versions/`."""
    path = _path(project, name)
    if path.is_file():
        write_text(free_path(project.private / "versions" / path.name), _read(path))
        path.unlink()


def xtuner_text(name: str) -> str:
    """The text of one of XTuner's own. Raises MachineError without XTuner, InputError if it lacks the file."""
    return _read(xtuner_folder() / "configs" / "deepspeed" / f"{name}.json")


def read_zero(values: Mapping[str, Any]) -> Zero:
    """Stage, offload and buckets; where a value is no such thing, DeepSpeed's default (the checks say what is wrong with it)."""
    section = values.get("zero_optimization")
    if not isinstance(section, Mapping):
        return Zero(overlaps=False)
    stage = _whole(section, "stage", 0)
    overlaps = section.get("overlap_comm")
    live = _whole(section, "max_live_parameters", _LIVE)
    return Zero(
        stage=stage,
        offloads_optimizer=_is_offloaded(section.get("offload_optimizer")),
        offloads_parameters=stage == 3 and _is_offloaded(section.get("offload_param")),
        bucket_elements=_whole(section, "reduce_bucket_size", _BUCKET),
        overlaps=overlaps if isinstance(overlaps, bool) else stage == 3,
        live_elements=_whole(section, "stage3_max_live_parameters", live),
    )


def zero_of(details: Mapping[str, Any]) -> Zero:
    """Of a run, from its run.json. Runs of older versions name one of XTuner's settings and keep no text."""
    kept = details.get("deepspeed_config")
    if isinstance(kept, Mapping) and "text" in kept:
        return read_zero(read_object(str(kept["text"])).values)
    return zero_of_choice(details.get("deepspeed"))


def zero_of_choice(choice: str | None) -> Zero:
    """What the name of one of XTuner's settings says: they overlap, and offload everything they can."""
    if not choice:
        return Zero(overlaps=False)
    stage, is_offloaded = int(choice.removeprefix("deepspeed_zero")[:1] or 0), "offload" in choice
    return Zero(stage=stage, offloads_optimizer=is_offloaded, offloads_parameters=is_offloaded and stage == 3)


def _is_offloaded(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device") in ("cpu", "nvme")


def _whole(section: Mapping[str, Any], name: str, default: int) -> int:
    value = section.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return int(value) if is_number and value >= 0 else default


def _path(project: Project, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InputError("deepspeed.bad_name", name=name)
    return project.config / FOLDER / f"{name}.json"


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError("deepspeed.too_large", limit_kib=MAX_BYTES // 1024)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError("files.missing", path=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError("files.not_utf8", path=str(path), offset=error.start) from error
