"""Whether a person allowed a model's own Python code to run. Remembers a hash for each model; runs nothing."""

import hashlib
from pathlib import Path
from typing import Any, Final

from core.errors import InputError
from core.files import read_json, write_json
from core.project import Project

_FILE: Final = "remote_code.json"


def code_files(folder: Path) -> list[Path]:
    """Python files of a model folder, sub-folders included: any of them can be imported by the one that `auto_map` names."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def code_hash(folder: Path) -> str | None:
    """SHA-256 over names and contents of the model's Python files; None if it has none."""
    files = code_files(folder)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def needs_code(folder: Path) -> bool:
    """Whether loading the model or its tokenizer runs Python files of the folder."""
    return any("auto_map" in _optional(folder / name) for name in ("config.json", "tokenizer_config.json"))


def is_allowed(project: Project, folder: Path) -> bool:
    """Whether the code of `folder` may run: it needs none, or a person allowed exactly these files.

    They may have been allowed in another folder of the project: an adapter's merged model carries its base model's code.
    """
    if not needs_code(folder):
        return True
    found = code_hash(folder)
    return found is None or any(found in hashes for hashes in _allowed(project).values())


def allow(project: Project, folder: Path) -> None:
    """Remember that the code of `folder`, as it is now, may run. A changed file asks again."""
    found = code_hash(folder)
    if found is not None:
        known = _allowed(project)
        key = str(folder.resolve())
        known[key] = sorted({*known.get(key, []), found})
        write_json(project.private / _FILE, known)


def require_allowed(project: Project, folder: Path) -> None:
    """Raises InputError if the model needs code that nobody has allowed."""
    if not is_allowed(project, folder):
        raise InputError(
            "models.code_not_allowed", path=str(folder), files=", ".join(file.name for file in code_files(folder))
        )


def _optional(file: Path) -> dict[str, Any]:
    """A JSON object that may be missing or broken: loading the model will say so."""
    try:
        value = read_json(file)
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def _allowed(project: Project) -> dict[str, list[str]]:
    file = project.private / _FILE
    value: Any = read_json(file) if file.is_file() else {}
    known = value.items() if isinstance(value, dict) else ()
    return {key: hashes for key, hashes in known if isinstance(hashes, list)}
