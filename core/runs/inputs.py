"""What a training reads: base model, data, template, numbers of the config. Checked for use, and described as run.json keeps it."""

import hashlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from core.config.edits import data_files, method_of
from core.config.facts import read_data
from core.config.source import ConfigSource
from core.config.validation import read_validation
from core.errors import InputError
from core.files import read_json
from core.models.inspect import fingerprint
from core.models.remote_code import require_allowed
from core.project import Project
from core.xtuner.templates import prompt_templates, system_templates


def read(project: Project, source: ConfigSource) -> dict[str, Any]:
    """`base_model`, `data` and `prompt_template` of run.json. Raises InputError for what cannot be used."""
    return {
        "base_model": _base_model(project, source),
        "data": _data(project, source),
        "prompt_template": _prompt_template(source),
    }


def settings(project: Project, source: ConfigSource) -> dict[str, Any]:
    """What run.json says of the config itself: method, lengths, validation and the system text."""
    return {
        "validation": _validation(project, source),
        "system": _system(source),
        "method": method_of(source),
        "max_length": source.effective("max_length"),
        "batch_size": source.effective("batch_size", 1),
        "accumulative_counts": source.effective("accumulative_counts", 1),
    }


def _base_model(project: Project, source: ConfigSource) -> dict[str, Any]:
    """Path, fingerprint and type. Raises InputError for a folder that is missing or lacks config or weights, or is not trusted."""
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
    require_allowed(project, folder)
    kind = str(read_json(folder / "config.json").get("model_type", ""))
    return {"path": str(folder), "fingerprint": fingerprint(folder), "model_type": kind, "is_local": True}


def _data(project: Project, source: ConfigSource) -> list[dict[str, Any]]:
    """Path, hash and rows of each file it trains on. Raises InputError for one that is missing or empty, or if there is none."""
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
    path = _absolute(project, name)
    if not path.is_file():
        raise InputError("train.data_missing", path=name)
    facts = read_data(path)
    if facts.rows == 0:
        raise InputError("train.data_empty", path=name)
    status = path.stat()
    return {"path": str(path), "sha256": _file_sha256(path, status.st_size, status.st_mtime_ns), "rows": facts.rows}


def _prompt_template(source: ConfigSource) -> dict[str, Any] | None:
    """The template itself, not its name: the chat needs it when XTuner's may have changed. None where it is not known."""
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


def _absolute(project: Project, name: str) -> Path:
    """As the trainer sees it: its working directory is the project."""
    path = Path(name)
    return path if path.is_absolute() else project.root / path


@cache
def _file_sha256(path: Path, _size_bytes: int, _changed_at: int) -> str:
    """Remembered until the file changes: the launch page plans anew at every click, and data may be gigabytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
