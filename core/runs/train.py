"""A training run, from what a person chose to a started run directory. Checks first; knows no widget and imports no engine."""

import hashlib
import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from core.checkpoints.inspect import CheckpointCard, inspect_checkpoint
from core.config.checks import Surroundings, gather
from core.config.edits import data_files, method_of
from core.config.facts import read_machine
from core.config.findings import Context, iterations_per_epoch
from core.config.library import read_config
from core.config.source import ConfigSource
from core.errors import ConflictError, InputError
from core.files import read_json, require_space, write_text
from core.launchers import local
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, new_id, now_utc
from core.xtuner.command import DEEPSPEED_CHOICES
from core.xtuner.templates import prompt_templates, system_templates

_NAME: Final = re.compile(r"[^\W_][\w.-]{0,63}", re.UNICODE)
_SPARE_BYTES: Final = 256 * 2**20
"""Free space that every run needs for logs and caches, besides its checkpoints."""
_PACKAGES: Final = (
    "torch",
    "transformers",
    "xtuner",
    "mmengine",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
)
_STOP_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What a person chose on the launch page."""

    config: Path
    """The config to train with; the run gets its own copy."""
    gpus: tuple[str, ...] = ()
    """UUIDs or indices, one process each. None: CPU."""
    cpu_processes: int = 1
    """World size on CPU."""
    deepspeed: str | None = None
    """One of XTuner's own (`deepspeed_zero2`, …), or none."""
    resume: Path | None = None
    """A checkpoint to go on from."""
    seed: int | None = 42
    """Of a resumed run the checkpoint's seed holds."""
    name: str = ""
    """Folder name of the run; empty: made from the time."""
    speed: str | dict[str, Any] = "off"
    """What `core.xtuner.runtime.speed.parts.Wish` reads."""
    python: str = field(default=sys.executable)
    """The interpreter that trains."""

    @property
    def world_size(self) -> int:
        return len(self.gpus) or self.cpu_processes


def plan(project: Project, request: TrainRequest) -> RunSpec:
    """What run.json will say, after every check that can be made before the start. Writes nothing.

    Raises InputError for a config, model, data set, checkpoint or name that cannot be used, ConflictError for a name that is
    taken, MachineError for too little space.
    """
    text = read_config(request.config)
    source = ConfigSource(text)
    _check_engine(source, request)
    model = _base_model(project, source)
    data = _data(project, source)
    run_id = _run_id(project, request.name)
    resume = _resumable(request) if request.resume else None
    require_space(project.train, _SPARE_BYTES + 2 * (resume.size_bytes if resume else 0))
    context = gather(source, surroundings(project, request))
    is_local = model["is_local"] and all(entry["sha256"] for entry in data)
    folder = project.train / run_id
    started = local.command(request.python, folder, gpus=request.gpus, world_size=request.world_size, is_local=is_local)
    details = {
        "config": {"name": request.config.stem, "sha256": _sha256(text.encode()), "path": str(request.config)},
        "base_model": model,
        "data": data,
        "prompt_template": _prompt_template(source),
        "system": _system(source),
        "method": method_of(source),
        "max_length": source.effective("max_length"),
        "batch_size": source.effective("batch_size", 1),
        "accumulative_counts": source.effective("accumulative_counts", 1),
        "world_size": request.world_size,
        "deepspeed": request.deepspeed,
        "resume": str(request.resume.absolute()) if request.resume else None,
        "seed": request.seed,
        "speed": request.speed,
        "total_iterations": _iterations(source, context),
        "versions": versions(),
    }
    return RunSpec(
        id=run_id,
        kind="train",
        title=request.config.stem,
        argv=started.argv,
        cwd=str(project.root),
        env=started.env,
        gpus=list(request.gpus),
        created_at=now_utc(),
        stop_seconds=_STOP_SECONDS,
        details=details,
    )


def surroundings(project: Project, request: TrainRequest) -> Surroundings:
    """What the config's checks need to know of this start."""
    machine = replace(read_machine(project), gpu_count=len(request.gpus))
    return Surroundings(machine, request.world_size, request.deepspeed)


def start_training(project: Project, request: TrainRequest) -> RunDirectory:
    """Plan, copy the config into the run's `source/`, and start it detached. Raises what plan raises."""
    spec = plan(project, request)
    run = RunDirectory(project.train / spec.id)
    try:
        run.path.mkdir(parents=True)
    except FileExistsError as error:
        raise ConflictError("train.name_taken", name=spec.id) from error
    text = read_config(request.config)
    if _sha256(text.encode()) != spec.details["config"]["sha256"]:
        raise ConflictError("train.config_changed", path=str(request.config))
    write_text(run.source / f"{spec.details['config']['name']}.py", text)
    return launch(project.train, spec)


def resumable(project: Project) -> list[CheckpointCard]:
    """Complete checkpoints of this project's runs that training can go on from, newest first."""
    from core.checkpoints.inspect import list_checkpoints

    folders = [folder for folder in project.train.iterdir() if folder.is_dir()] if project.train.is_dir() else []
    cards = [card for folder in [*folders, project.train] for card in list_checkpoints(folder)]
    return sorted(
        (card for card in cards if card.is_complete and card.has_optimizer),
        key=lambda card: card.modified_at,
        reverse=True,
    )


def versions() -> dict[str, str]:
    """Python and the packages of the training stack that are installed here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _check_engine(source: ConfigSource, request: TrainRequest) -> None:
    if source.get("framework", "mmengine") == "huggingface":
        raise InputError("train.other_framework", path=str(request.config))
    if not source.has("model.llm") or not source.has("train_dataloader"):
        raise InputError("train.not_a_training_config", path=str(request.config))
    if request.deepspeed is not None and request.deepspeed not in DEEPSPEED_CHOICES:
        raise InputError("train.unknown_deepspeed", name=request.deepspeed, known=", ".join(DEEPSPEED_CHOICES))
    if request.world_size < 1:
        raise InputError("train.no_process")


def _base_model(project: Project, source: ConfigSource) -> dict[str, Any]:
    """Path, fingerprint and type. A name of the hub has neither fingerprint nor type; it must be reachable when it trains."""
    named = source.get("model.llm.pretrained_model_name_or_path", None)
    if not isinstance(named, str) or not named:
        raise InputError("train.no_model_named")
    folder = _absolute(project, named)
    if not folder.is_dir():
        raise InputError("train.model_missing", path=named)
    if not (folder / "config.json").is_file():
        raise InputError("train.model_without_config", path=str(folder))
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise InputError("train.model_without_weights", path=str(folder))
    from core.models.inspect import fingerprint

    kind = str(read_json(folder / "config.json").get("model_type", ""))
    return {"path": str(folder), "fingerprint": fingerprint(folder), "model_type": kind, "is_local": True}


def _data(project: Project, source: ConfigSource) -> list[dict[str, Any]]:
    from core.config.facts import read_data

    files = data_files(source)
    if not files:
        raise InputError("train.no_local_data")
    described = []
    for name in files:
        path = _absolute(project, name)
        if not path.is_file():
            raise InputError("train.data_missing", path=name)
        facts = read_data(path)
        if facts.rows == 0:
            raise InputError("train.data_empty", path=name)
        described.append({"path": str(path), "sha256": _file_sha256(path), "rows": facts.rows})
    return described


def _absolute(project: Project, name: str) -> Path:
    """As the trainer sees it: its working directory is the project."""
    path = Path(name)
    return path if path.is_absolute() else project.root / path


def _resumable(request: TrainRequest) -> CheckpointCard:
    """The checkpoint to go on from. Raises InputError if it is damaged or does not fit this world size or DeepSpeed choice."""
    assert request.resume is not None
    if not request.resume.exists():
        raise InputError("train.checkpoint_missing", path=str(request.resume))
    card = inspect_checkpoint(request.resume)
    if card.problem is not None:
        raise card.problem
    if not card.has_optimizer:
        raise InputError("train.checkpoint_without_optimizer", path=str(card.path))
    if card.is_folder != bool(request.deepspeed):
        code = "train.checkpoint_needs_deepspeed" if card.is_folder else "train.checkpoint_without_deepspeed"
        raise InputError(code, path=str(card.path))
    if not card.is_folder:
        return card
    stage = int(str(request.deepspeed).removeprefix("deepspeed_zero")[0])
    if (card.stage == 3) != (stage == 3):
        raise InputError("train.other_stage", path=str(card.path), saved=card.stage, asked=stage)
    if card.world_size != request.world_size:
        raise InputError("train.other_world_size", path=str(card.path), saved=card.world_size, asked=request.world_size)
    return card


def _run_id(project: Project, name: str) -> str:
    if not name:
        return new_id("train", project.train)
    if not _NAME.fullmatch(name):
        raise InputError("train.bad_name", name=name)
    if (project.train / name).exists():
        raise ConflictError("train.name_taken", name=name)
    return name


def _prompt_template(source: ConfigSource) -> dict[str, Any] | None:
    value = source.get("prompt_template", None)
    if isinstance(value, dict):
        return dict(value)
    name = str(value).split(".")[-1] if value is not None else ""
    template = prompt_templates().get(name)
    return template.to_json() if template else None


def _system(source: ConfigSource) -> str:
    """The system text of the sample answers, which is the one to chat with."""
    value = source.get("SYSTEM", "")
    name = str(value)
    if name.startswith("SYSTEM_TEMPLATE."):
        return system_templates().get(name.rsplit(".", maxsplit=1)[-1], "")
    return name if type(value) is str else ""


def _iterations(source: ConfigSource, context: Context) -> int | None:
    """Micro-steps to come, as far as they can be known before tokenising; the trainer's own lines say it exactly."""
    per_epoch = iterations_per_epoch(source, context)
    epochs = source.effective("max_epochs")
    if per_epoch is None or not isinstance(epochs, int | float):
        return None
    return round(epochs * sum(per_epoch) / 2)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
