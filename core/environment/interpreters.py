"""Which Pythons could train on this machine, and which one this project chose. Looks at files only, starts nothing."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from core.environment.checks import is_legacy_xtuner
from core.environment.known_good import normalise
from core.errors import InputError
from core.files import read_json, write_json
from core.project import Project

_FILE: Final = "environment.json"
_OLDEST_MINOR: Final = 11
"""Of Python 3: what the app's code in the trainer needs (tomllib, StrEnum)."""
_CONDA_PLACES: Final = (
    "/opt/conda",
    "/root/share",
    "/share",
    "/root/.conda",
    "/usr/local/miniconda3",
    "~/.conda",
    "~/miniconda3",
    "~/anaconda3",
    "~/miniforge3",
    "~/mambaforge",
)
"""Where conda and its variants install themselves; `/root/share` and `/share` are InternStudio's."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """One Python that could train."""

    python: Path
    """Not resolved: a link in a virtual environment means that environment."""
    source: str
    """`current`, `settings`, `project`, `venv` or `conda`."""
    name: str
    xtuner: str | None
    """Version of XTuner there, from the names of the files; None if it has none."""


def find_interpreters(
    project: Project, chosen: Path | None = None, environ: Mapping[str, str] = os.environ
) -> list[Interpreter]:
    """The app's own Python, the one set by the settings, environments in and beside the project, and conda's; each once."""
    candidates: list[tuple[Path, str]] = [(Path(sys.executable), "current")]
    if chosen is not None:
        candidates.append((chosen, "settings"))
    candidates += [
        (folder / "bin/python", "project")
        for folder in (project.private / "env", project.root / ".venv", project.root / "venv")
    ]
    candidates += [
        (file, "venv")
        for pattern in (".venv/bin/python", "*/bin/python")
        for file in sorted(project.root.parent.glob(pattern))
        if (file.parents[1] / "pyvenv.cfg").is_file()
    ]
    candidates += [(folder / "bin/python", "conda") for folder in _conda_folders(environ)]
    remembered = _remembered(project)
    if remembered is not None:
        candidates.append((remembered, "project"))
    found: dict[Path, Interpreter] = {}
    for python, source in candidates:
        if is_executable(python):
            folder = python.parents[1].resolve()
            found.setdefault(folder, Interpreter(python, source, python.parents[1].name, xtuner_version(python)))
    return list(found.values())


def training_python(project: Project, default: Path | None = None) -> Path:
    """The Python that trains this project: the one chosen for it, else `default` (`Settings.python`), else the app's own.

    Raises InputError if the chosen one is gone.
    """
    python = _remembered(project) or default or Path(sys.executable)
    if not is_executable(python):
        raise InputError("environment.python_gone", path=str(python))
    return python


def choose_python(project: Project, python: Path) -> None:
    """Remember the Python that trains this project. Raises InputError if it cannot be run."""
    python = python.expanduser()
    if not python.is_absolute() or not is_executable(python):
        raise InputError("environment.not_a_python", path=str(python))
    write_json(project.private / _FILE, {"schema_version": 1, "python": str(python)})


def xtuner_version(python: Path) -> str | None:
    """Version of the XTuner installed beside `python`, read from the name of its dist-info folder."""
    return installed_versions(python, "xtuner-*").get("xtuner")


def installed_versions(python: Path, pattern: str = "*") -> dict[str, str]:
    """Version of each package installed beside `python`, by normalised name, from the names of its dist-info folders."""
    found: dict[str, str] = {}
    for record in sorted(python.parents[1].glob(f"lib/python*/site-packages/{pattern}.dist-info")):
        name, _, version = record.name.removesuffix(".dist-info").partition("-")
        found.setdefault(normalise(name), version)
    return found


def python_version(python: Path) -> str | None:
    """`3.10`, from the name of the library folder beside `python`; None where it cannot be told."""
    folders = sorted(python.parents[1].glob("lib/python3.*/site-packages"))
    return folders[0].parent.name.removeprefix("python") if len(folders) == 1 else None


def is_legacy(python: Path) -> bool:
    """Whether `python` trains without the app's own code in the trainer: XTuner 0.1.x, or a Python older than 3.11."""
    minor = (python_version(python) or "").partition(".")[2]
    return is_legacy_xtuner(xtuner_version(python)) or (minor.isdecimal() and int(minor) < _OLDEST_MINOR)


def is_executable(python: Path) -> bool:
    """Whether `python` is a file that may be run."""
    return python.is_file() and os.access(python, os.X_OK)


def _remembered(project: Project) -> Path | None:
    file = project.private / _FILE
    value = read_json(file) if file.is_file() else {}
    python = value.get("python") if isinstance(value, dict) else None
    return Path(str(python)) if python else None


def _conda_folders(environ: Mapping[str, str]) -> Iterator[Path]:
    """What `conda env list` shows: the file of environments it keeps, and the `envs` of the usual places."""
    if prefix := environ.get("CONDA_PREFIX"):
        yield Path(prefix)
    given = environ.get("CONDA_ENVS_PATH") or environ.get("CONDA_ENVS_DIRS") or ""
    parents = [Path(part).expanduser() for part in given.split(os.pathsep) if part]
    if program := environ.get("CONDA_EXE"):
        parents.append(Path(program).parents[1] / "envs")
    for parent in parents:
        yield from _conda_below(parent.glob("*"))
    known = Path("~/.conda/environments.txt").expanduser()
    if known.is_file():
        yield from (
            Path(line.strip())
            for line in known.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        )
    for place in _CONDA_PLACES:
        base = Path(place).expanduser()
        yield from _conda_below(chain([base], base.glob("envs/*"), base.glob("conda_envs/*"), base.glob("pre_envs/*")))


def _conda_below(folders: Iterable[Path]) -> list[Path]:
    """Those of `folders` that conda made, by name; none where they cannot be read."""
    try:
        return sorted(folder for folder in folders if (folder / "conda-meta").is_dir())
    except OSError:
        return []
