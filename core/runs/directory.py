"""A run is a directory. This module knows its files and what run.json says; it starts and stops nothing.

    run.json        immutable: the spec below, written once before the start
    state.json      written by the supervisor only (tmp file + rename)
    train.log       stdout and stderr of the process, for jobs too
    metrics.jsonl   one line a micro-step, written by the trainer's hook
    gpu.jsonl       one line a sample, written by the supervisor
    samples.jsonl   sample answers, one line each
    validation.jsonl  two lines a validation: {"iteration", "begun_at"}, then {"iteration", "loss", "tokens", "seconds", "is_best",
                    "waited", "patience", "ends", "at"}
    progress.json   done / total / message of a job (tmp file + rename)
    result.json     what a job returned;  error.json  the DanluError it ended with
    stop.request    intent of a person: {"mode": "save" | "cancel", "at": …}
    attempt.json    the run went on in its own folder: {"number", "resume", "log_offset", "at"}; missing: the first start
    alerts.json     what the supervisor finds wrong with the training (`core.runs.health`)
    watch.json      what it does about it: {"stop_on": […], "webhook": …}
    notes.json      tags and a note of a person
    imported.json   it came with an archive (`core.archive`): to look at, never to start
    source/         the run's own copy of the config source, never edited
    …               XTuner's own files (iter_N.pth, last_checkpoint, <timestamp>/vis_data/…)

A train run lies in `project.train/<id>/`, every other job in `project.jobs/<id>/`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from core.errors import InputError
from core.files import read_json
from core.schema import upgraded, version_of

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What run.json holds. Never changes after the start."""

    id: str
    """Folder name, unique in its parent: `<kind>_<YYYYmmdd_HHMMSS>[_n]` or the name a person gave."""
    kind: str
    """`train`, or a job: `copy`, `dequantize`, `environment`, `adapter`, `merge`, `chat`, …"""
    title: str
    """One line for lists, in the user's own terms (a model, data or config name)."""
    argv: list[str]
    """The exact command. argv[0] is an absolute path to the interpreter that runs it."""
    cwd: str
    env: dict[str, str] = field(default_factory=dict)
    """Only what is added to the environment of the supervisor."""
    gpus: list[str] = field(default_factory=list)
    """UUIDs or indices of the GPUs that belong to the run; empty: none."""
    created_at: str
    """ISO 8601 in UTC."""
    stop_seconds: float = 120.0
    """How long `stop.request` may take (save and exit) before SIGTERM; SIGKILL comes 15 s after that."""
    details: dict[str, Any] = field(default_factory=dict)
    """Specific to the kind. train: config name and hash, data and model hashes, prompt template, resume, world size, versions."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises TypeError if a field is missing or is no such thing."""
        known = {key: value[key] for key in cls.__dataclass_fields__ if key in value}
        spec = cls(**known)
        for name, kind in _KINDS.items():
            if not isinstance(getattr(spec, name), kind):
                raise TypeError(f"{name}: {type(getattr(spec, name)).__name__}")
        return spec


_KINDS: Final[dict[str, Any]] = {
    "id": str, "kind": str, "title": str, "argv": list, "cwd": str, "env": dict, "gpus": list, "created_at": str,
    "stop_seconds": int | float, "details": dict,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def spec_file(self) -> Path:
        return self.path / "run.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def log_file(self) -> Path:
        return self.path / "train.log"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def gpu_file(self) -> Path:
        return self.path / "gpu.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def validation_file(self) -> Path:
        return self.path / "validation.jsonl"

    @property
    def progress_file(self) -> Path:
        return self.path / "progress.json"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def error_file(self) -> Path:
        return self.path / "error.json"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop.request"

    @property
    def attempt_file(self) -> Path:
        return self.path / "attempt.json"

    @property
    def alerts_file(self) -> Path:
        return self.path / "alerts.json"

    @property
    def watch_file(self) -> Path:
        return self.path / "watch.json"

    @property
    def notes_file(self) -> Path:
        return self.path / "notes.json"

    @property
    def imported_file(self) -> Path:
        return self.path / "imported.json"

    @property
    def supervisor_lock(self) -> Path:
        """Held by the run's one supervisor as long as it lives."""
        return self.path / ".supervisor.lock"

    @property
    def go_on_lock(self) -> Path:
        """Held while someone makes the run go on in its own folder."""
        return self.path / ".go_on.lock"

    @property
    def source(self) -> Path:
        return self.path / "source"

    def spec(self) -> RunSpec:
        """What run.json says. Raises InputError if it is missing, broken or from a newer app."""
        value = read_json(self.spec_file)
        if (version_of(value) or 0) > SCHEMA_VERSION:
            raise InputError("runs.newer_spec", path=str(self.spec_file), version=version_of(value))
        value = upgraded(value, self.spec_file, SCHEMA_VERSION, {0: dict})  # in memory: nothing changes a run.json
        try:
            return RunSpec.from_json(value)
        except TypeError as error:
            raise InputError("runs.broken_spec", path=str(self.spec_file), reason=str(error)) from error
