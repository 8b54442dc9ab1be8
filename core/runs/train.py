"""A training run, from what a person chose to a started run directory. Checks first; knows no widget and imports no engine."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from core.config.checks import Surroundings
from core.config.checks_of_deepspeed import require_usable
from core.config.deepspeed import RUN_FILE
from core.config.findings import Context, iterations_per_epoch
from core.config.library import read_config
from core.config.source import ConfigSource
from core.environment.interpreters import is_legacy
from core.errors import ConflictError, InputError
from core.files import require_space, write_text
from core.launchers import slurm
from core.project import Project
from core.runs import inputs
from core.runs.command import batch, start_command, tool_python
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, new_id, now_utc, start_job
from core.runs.request import TrainRequest
from core.runs.resume import Mode, ResumePlan, edited, plan_resume, start_edits
from core.runs.start import Start, read_start
from core.runs.versions import versions
from core.runs.watch import inherit_rules

_NAME: Final = re.compile(r"[^\W_][\w.-]{0,63}", re.UNICODE)
_SPARE_BYTES: Final = 256 * 2**20
"""Free space that every run needs for logs and caches, besides its checkpoints."""
_STOP_SECONDS: Final = 300.0
CARRY_OVER: Final = "core.runs.carry_over:carry_over"
_NO_GPU: Final = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Cutting a checkpoint anew is work for the CPU; the GPUs may belong to another run."""


def plan(project: Project, request: TrainRequest, start: Start | None = None) -> RunSpec:
    """What run.json will say, after every check that can be made before the start. Writes nothing.

    start: of this request, where it was read already.

    Raises InputError for a config, model, data set, checkpoint or name that cannot be used, ConflictError for a name that is
    taken, MachineError for too little space.
    """
    start = start or read_start(project, request)
    source, around = start.source, start.around
    _check_engine(source, request)
    read = inputs.read(project, source)
    run_id = _run_id(project, request.name)
    resume = _plan_resume(source, request, around, read)
    if resume:
        source = edited(source, resume.edits)
        require_space(project.train, (2 + resume.is_written_anew) * resume.size_bytes + _SPARE_BYTES)
    require_space(project.train, _SPARE_BYTES)
    require_usable(source, start.context)
    folder = project.train / run_id
    if resume:
        source = edited(source, start_edits(resume.to_json(), folder))
    resumes_from = _resume_path(folder, resume)
    is_local = read["base_model"]["is_local"] and all(entry["sha256"] for entry in read["data"])
    started = start_command(request, folder, around.setting, resumes_from, is_local=is_local)
    is_old = is_legacy(Path(request.python))
    return RunSpec(
        id=run_id,
        kind="train",
        title=request.config.stem,
        argv=started.argv,
        cwd=str(project.root),
        env=started.env,
        gpus=request.own_gpus,
        created_at=now_utc(),
        stop_seconds=0.0 if is_old else _STOP_SECONDS,
        details={
            "config": {"name": request.config.stem, "sha256": _sha256(source.text), "path": str(request.config)},
            **read,
            **inputs.settings(project, source),
            **_place(request, around),
            "slurm": batch(project, request, folder, is_local=is_local),
            "resume": resumes_from,
            "resumed_from": resume.to_json() if resume else None,
            "seed": request.seed,
            "speed": "off" if is_old else request.speed,
            "total_iterations": _iterations(source, start.context),
            "versions": versions(request.python),
        },
    )


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
            python=tool_python(request),
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
    if _sha256(source.text) != spec.details["config"]["sha256"]:
        raise ConflictError("train.config_changed", path=str(request.config))
    write_text(run.source / f"{spec.details['config']['name']}.py", source.text)
    if spec.details["deepspeed_config"]:
        write_text(run.path / RUN_FILE, spec.details["deepspeed_config"]["text"])
    if spec.details["slurm"]:
        write_text(run.path / slurm.BATCH_FILE, spec.details["slurm"]["text"])


def is_written_anew(spec: RunSpec) -> bool:
    """Whether a checkpoint lies in the run's own folder before it starts."""
    resumed = spec.details["resumed_from"]
    return bool(resumed and resumed["is_written_anew"])


def _check_engine(source: ConfigSource, request: TrainRequest) -> None:
    if source.get("framework", "mmengine") == "huggingface":
        raise InputError("train.other_framework", path=str(request.config))
    if not source.has("model.llm") or not source.has("train_dataloader"):
        raise InputError("train.not_a_training_config", path=str(request.config))
    if request.world_size < 1:
        raise InputError("train.no_process")


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


def _run_id(project: Project, name: str) -> str:
    if not name:
        return new_id("train", project.train)
    if not _NAME.fullmatch(name):
        raise InputError("train.bad_name", name=name)
    if (project.train / name).exists():
        raise ConflictError("train.name_taken", name=name)
    return name


def _place(request: TrainRequest, around: Surroundings) -> dict[str, Any]:
    """Where it trains and over how many processes, as run.json says it."""
    return {
        "world_size": request.world_size,
        "launcher": "slurm" if request.slurm else "nodes" if request.nodes else "local",
        "nodes": request.nodes.to_json() if request.nodes else None,
        "deepspeed": around.deepspeed,
        "deepspeed_config": around.setting.to_json() if around.setting else None,
    }


def _iterations(source: ConfigSource, context: Context) -> int | None:
    """Micro-steps to come, as far as they can be known before tokenising; the trainer's own lines say it exactly."""
    per_epoch = iterations_per_epoch(source, context)
    epochs = source.effective("max_epochs")
    if per_epoch is None or not isinstance(epochs, int | float):
        return None
    return round(epochs * sum(per_epoch) / 2)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
