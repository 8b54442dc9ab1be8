"""A training run, from what a person chose to a started run directory. Checks first; knows no widget and imports no engine."""

import hashlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from core.checkpoints.inspect import CheckpointCard, list_checkpoints
from core.config import deepspeed
from core.config.checks import Surroundings, gather
from core.config.checks_of_deepspeed import require_usable
from core.config.edits import data_files, method_of
from core.config.facts import read_machine
from core.config.findings import Context, iterations_per_epoch
from core.config.library import read_config
from core.config.source import ConfigSource
from core.config.validation import read_validation
from core.environment.interpreters import installed_versions, is_legacy, python_version
from core.errors import ConflictError, InputError
from core.files import read_json, require_space, write_text
from core.launchers import local, slurm
from core.launchers.nodes import NodesWish, local_argv, node_env
from core.launchers.slurm import SlurmWish
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.jobs import list_runs
from core.runs.launch import launch, new_id, now_utc, start_job
from core.runs.resume import Mode, ResumePlan, edited, plan_resume, start_edits
from core.runs.watch import inherit_rules
from core.xtuner.legacy import legacy_argv
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
DEEPSPEED_FILE: Final = "deepspeed.json"
"""In the run's `source/`: the DeepSpeed config as a person chose it."""
CARRY_OVER: Final = "core.runs.carry_over:carry_over"
_NO_GPU: Final = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Cutting a checkpoint anew is work for the CPU; the GPUs may belong to another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What a person chose on the launch page."""

    config: Path
    """The config to train with; the run gets its own copy."""
    gpus: tuple[str, ...] = ()
    """UUIDs or indices, one process each. None: CPU."""
    cpu_processes: int = 1
    """World size on CPU."""
    slurm: SlurmWish | None = None
    """Train on a cluster instead of this machine."""
    nodes: NodesWish | None = None
    """Train on this and other machines."""
    deepspeed: str | None = None
    """Name of one of XTuner's own (`deepspeed_zero2`, …) or of the project's (`core.config.deepspeed`), or none."""
    resume: Path | None = None
    """A checkpoint to go on from."""
    resume_mode: Mode = Mode.EXACT
    extra_epochs: float = 0
    """Epochs beyond those that the run of the checkpoint was planned for."""
    seed: int | None = 42
    """Of a resumed run the checkpoint's seed holds."""
    name: str = ""
    """Folder name of the run; empty: made from the time."""
    speed: str | dict[str, Any] = "auto"
    """What `core.xtuner.runtime.speed.parts.Wish` reads."""
    python: str = field(default=sys.executable)
    """The interpreter that trains."""

    @property
    def world_size(self) -> int:
        several = self.slurm or self.nodes
        return several.world_size if several else len(self.gpus) or self.cpu_processes

    @property
    def gpu_count(self) -> int:
        """On one machine."""
        several = self.slurm or self.nodes
        if several:
            return several.processes if several.has_gpus else 0
        return len(self.gpus)

    @property
    def own_gpus(self) -> list[str]:
        """Of this machine, which no other run may have meanwhile."""
        return [str(number) for number in range(self.gpu_count)] if self.nodes else list(self.gpus)

    def to_json(self) -> dict[str, Any]:
        value = {**asdict(self), "config": str(self.config), "gpus": list(self.gpus)}
        return {**value, "resume": str(self.resume) if self.resume else None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        resume = Path(value["resume"]) if value.get("resume") else None
        mode = Mode(value.get("resume_mode", Mode.EXACT))
        wish = SlurmWish.from_json(value["slurm"]) if value.get("slurm") else None
        nodes = NodesWish.from_json(value["nodes"]) if value.get("nodes") else None
        places = {
            "config": Path(value["config"]),
            "resume": resume,
            "resume_mode": mode,
            "slurm": wish,
            "nodes": nodes,
        }
        return cls(**{**value, **places, "gpus": tuple(value.get("gpus") or ())})


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
    template = _prompt_template(source)
    around = surroundings(project, request)
    resume = _plan_resume(source, request, around, {"base_model": model, "data": data, "prompt_template": template})
    if resume:
        source = edited(source, resume.edits)
        require_space(project.train, (2 + resume.is_written_anew) * resume.size_bytes + _SPARE_BYTES)
    require_space(project.train, _SPARE_BYTES)
    context = gather(source, around)
    require_usable(source, context)
    is_local = model["is_local"] and all(entry["sha256"] for entry in data)
    folder = project.train / run_id
    if resume:
        source = edited(source, start_edits(resume.to_json(), folder))
    started = _command(request, folder, is_local=is_local)
    is_old = is_legacy(Path(request.python))
    details = {
        "config": {"name": request.config.stem, "sha256": _sha256(source.text.encode()), "path": str(request.config)},
        "base_model": model,
        "data": data,
        "validation": _validation(project, source),
        "prompt_template": template,
        "system": _system(source),
        "method": method_of(source),
        "max_length": source.effective("max_length"),
        "batch_size": source.effective("batch_size", 1),
        "accumulative_counts": source.effective("accumulative_counts", 1),
        "world_size": request.world_size,
        "launcher": "slurm" if request.slurm else "nodes" if request.nodes else "local",
        "nodes": request.nodes.to_json() if request.nodes else None,
        "slurm": _batch(project, request, folder, is_local=is_local),
        "deepspeed": around.deepspeed,
        "deepspeed_config": around.setting.to_json() if around.setting else None,
        "resume": _resume_path(folder, resume),
        "resumed_from": resume.to_json() if resume else None,
        "seed": request.seed,
        "speed": "off" if is_old else request.speed,
        "total_iterations": _iterations(source, context),
        "versions": versions(request.python),
    }
    return RunSpec(
        id=run_id,
        kind="train",
        title=request.config.stem,
        argv=_legacy_argv(started.argv, request, around, _resume_path(folder, resume)) if is_old else started.argv,
        cwd=str(project.root),
        env=started.env,
        gpus=request.own_gpus,
        created_at=now_utc(),
        stop_seconds=0.0 if is_old else _STOP_SECONDS,
        details=details,
    )


def surroundings(project: Project, request: TrainRequest) -> Surroundings:
    """What the config's checks need to know of this start."""
    machine = replace(read_machine(project), gpu_count=request.gpu_count)
    setting = deepspeed.find(project, request.deepspeed) if request.deepspeed else None
    return Surroundings(machine, request.world_size, setting.zero.choice if setting else None, setting)


def start_training(project: Project, request: TrainRequest) -> RunDirectory:
    """Plan, copy the config into the run's `source/`, and start it detached. Raises what plan raises.

    If a checkpoint must be written anew first, a job of kind "reshape" does that and starts the run at its end; then the job
    is returned.
    """
    spec = plan(project, request)
    if is_written_anew(spec):
        named = replace(request, name=spec.id)
        arguments = {"project": str(project.root), "request": named.to_json()}
        return start_job(
            project,
            CARRY_OVER,
            kind="reshape",
            title=spec.id,
            arguments=arguments,
            env=_NO_GPU,
            python=_tool_python(request),
        )
    run = make_folder(project, spec)
    write_source(run, spec, request)
    inherit_rules(project.private, run)
    return launch(project.train, spec)


def make_folder(project: Project, spec: RunSpec) -> RunDirectory:
    """The run's new folder. Raises ConflictError if the name was taken meanwhile."""
    run = RunDirectory(project.train / spec.id)
    try:
        run.path.mkdir(parents=True)
    except FileExistsError as error:
        raise ConflictError("train.name_taken", name=spec.id) from error
    return run


def write_source(run: RunDirectory, spec: RunSpec, request: TrainRequest) -> None:
    """The run's own copy of the config, with the changes that going on from a checkpoint needs."""
    resumed = spec.details["resumed_from"]
    source = ConfigSource(read_config(request.config))
    if resumed:
        source = edited(source, resumed["edits"] | start_edits(resumed, run.path))
    if _sha256(source.text.encode()) != spec.details["config"]["sha256"]:
        raise ConflictError("train.config_changed", path=str(request.config))
    write_text(run.source / f"{spec.details['config']['name']}.py", source.text)
    if spec.details["deepspeed_config"]:
        write_text(run.source / DEEPSPEED_FILE, spec.details["deepspeed_config"]["text"])
    if spec.details["slurm"]:
        write_text(run.path / slurm.BATCH_FILE, spec.details["slurm"]["text"])


def is_written_anew(spec: RunSpec) -> bool:
    """Whether a checkpoint lies in the run's own folder before it starts."""
    resumed = spec.details["resumed_from"]
    return bool(resumed and resumed["is_written_anew"])


def project_checkpoints(project: Project) -> list[CheckpointCard]:
    """Checkpoints of all training runs of this project, damaged ones too, newest first. Opens headers only."""
    folders = {run.path for run in list_runs(project)}
    cards = [card for folder in folders for card in list_checkpoints(folder)]
    return sorted(cards, key=lambda card: card.modified_at, reverse=True)


def versions(python: str = sys.executable) -> dict[str, str]:
    """Python and the packages of the training stack that are installed for `python`."""
    if Path(python) != Path(sys.executable):
        installed = installed_versions(Path(python))
        found = {"python": python_version(Path(python)) or "?"}
        return found | {name: installed[name] for name in _PACKAGES if name in installed}
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _legacy_argv(argv: list[str], request: TrainRequest, around: Surroundings, resume: str | None) -> list[str]:
    """The command for XTuner 0.1.x, which trains without the app's hooks. Its last argument but the options is the run's folder."""
    config = Path(argv[-1]) / "source" / f"{request.config.stem}.py"
    needs_group = request.world_size > 1 or request.deepspeed is not None
    # Its own settings by name: another version may have changed them.
    is_own = around.setting is not None and around.setting.is_own
    setting = str(config.with_name(DEEPSPEED_FILE)) if is_own else request.deepspeed
    return legacy_argv(argv, config, deepspeed=setting, resume=resume, seed=request.seed, needs_group=needs_group)


def _tool_python(request: TrainRequest) -> str:
    """The Python for the app's own work with torch: the one that trains, unless it is too old for the app's code."""
    return sys.executable if is_legacy(Path(request.python)) else request.python


def _check_engine(source: ConfigSource, request: TrainRequest) -> None:
    if source.get("framework", "mmengine") == "huggingface":
        raise InputError("train.other_framework", path=str(request.config))
    if not source.has("model.llm") or not source.has("train_dataloader"):
        raise InputError("train.not_a_training_config", path=str(request.config))
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
    from core.models.remote_code import require_allowed

    require_allowed(project, folder)
    kind = str(read_json(folder / "config.json").get("model_type", ""))
    return {"path": str(folder), "fingerprint": fingerprint(folder), "model_type": kind, "is_local": True}


def _data(project: Project, source: ConfigSource) -> list[dict[str, Any]]:
    files = data_files(source)
    if not files:
        raise InputError("train.no_local_data")
    return [_described(project, name) for name in files]


def _validation(project: Project, source: ConfigSource) -> dict[str, Any] | None:
    """What it validates on and how; None if it does not."""
    validation = read_validation(source)
    if validation is None:
        return None
    return {**asdict(validation), "files": [_described(project, name) for name in validation.files]}


def _described(project: Project, name: str) -> dict[str, Any]:
    from core.config.facts import read_data

    path = _absolute(project, name)
    if not path.is_file():
        raise InputError("train.data_missing", path=name)
    facts = read_data(path)
    if facts.rows == 0:
        raise InputError("train.data_empty", path=name)
    return {"path": str(path), "sha256": _file_sha256(path), "rows": facts.rows}


def _absolute(project: Project, name: str) -> Path:
    """As the trainer sees it: its working directory is the project."""
    path = Path(name)
    return path if path.is_absolute() else project.root / path


def _plan_resume(
    source: ConfigSource, request: TrainRequest, around: Surroundings, details: Mapping[str, Any]
) -> ResumePlan | None:
    if request.resume is None:
        return None
    return plan_resume(
        request.resume.absolute(),
        source,
        details,
        mode=request.resume_mode,
        world_size=request.world_size,
        deepspeed=around.deepspeed,
        extra_epochs=request.extra_epochs,
    )


def _resume_path(folder: Path, resume: ResumePlan | None) -> str | None:
    """What the trainer resumes from: the checkpoint itself, or what is written from it."""
    if resume is None or resume.mode is Mode.WEIGHTS:
        return None
    return str(folder / resume.written_name if resume.is_written_anew else resume.checkpoint)


def _command(request: TrainRequest, folder: Path, *, is_local: bool) -> local.Command:
    if request.slurm:
        return slurm.command(sys.executable, folder)
    if request.nodes:
        argv = local_argv(request.python, folder)
        return local.Command(argv, node_env(request.nodes, is_local=is_local))
    return local.command(request.python, folder, gpus=request.gpus, world_size=request.world_size, is_local=is_local)


def _batch(project: Project, request: TrainRequest, folder: Path, *, is_local: bool) -> dict[str, Any] | None:
    """What was asked of Slurm, with the batch file as it will be submitted."""
    wish = request.slurm
    if wish is None:
        return None
    made = slurm.batch_text(wish, request.python, folder, project.root, name=folder.name, is_local=is_local)
    return replace(wish, text=wish.text or made).to_json()


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
