"""Everything needed to judge or repeat a run, in one zip: what it was told, what it measured, and with what it ran. No weights."""

import hashlib
import json
import platform
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError, MachineError
from core.files import read_json
from core.runs.directory import RunDirectory

_FILES: Final = (
    "run.json", "state.json", "attempt.json", "alerts.json", "notes.json", "watch.json", "result.json", "error.json",
    "metrics.jsonl", "validation.jsonl", "samples.jsonl", "gpu.jsonl", "train.log", "supervisor.log", "deepspeed.json",
)  # fmt: skip
_APP_ROOT: Final = Path(__file__).parents[2]
_WITH_ADDRESS: Final = "watch.json"
"""Holds a webhook's address, which is a key: only its rules go into the bundle."""


def write_bundle(run: RunDirectory, target: Path) -> Path:
    """Write `target`, a zip with one folder named after the run, and return it. Raises MachineError on a full disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as bundle:
            for file in _members(run):
                place = f"{run.id}/{file.relative_to(run.path)}"
                if file.name == _WITH_ADDRESS:
                    bundle.writestr(place, _without_address(file))
                else:
                    bundle.write(file, place)
            bundle.writestr(f"{run.id}/provenance.json", json.dumps(provenance(run), ensure_ascii=False, indent=2))
    except OSError as error:
        if target.is_file():
            target.unlink()
        raise MachineError("files.cannot_write", path=str(target), reason=error.strerror or str(error)) from error
    return target


def provenance(run: RunDirectory) -> dict[str, Any]:
    """What the run was made with: app commit, Python, packages now installed, and hash and size of each file of the folder."""
    return {
        "app_commit": app_commit(),
        "python": sys.version,
        "platform": platform.platform(),
        "packages": dict(sorted((each.metadata["Name"], each.version) for each in distributions())),
        "files": {str(file.relative_to(run.path)): _described(file) for file in _all_files(run)},
    }


def app_commit(root: Path = _APP_ROOT) -> str | None:
    """The git commit of the app, read from .git without git; None outside of a checkout."""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)


def _members(run: RunDirectory) -> list[Path]:
    named = [run.path / name for name in _FILES]
    found = [*named, *sorted(run.source.glob("*")), *sorted(run.path.glob("*/vis_data/scalars.json"))]
    return [file for file in found if file.is_file() and not file.is_symlink()]


def _all_files(run: RunDirectory) -> list[Path]:
    return sorted(file for file in run.path.rglob("*") if file.is_file() and not file.name.startswith("."))


def _described(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _without_address(file: Path) -> str:
    try:
        rules = read_json(file)
    except DanluError:
        return "{}"
    return json.dumps({**rules, "webhook": ""} if isinstance(rules, dict) else {})
