"""Examines the interpreter that will train, keeps the last report, and makes a new environment. Judges nothing itself."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from core.environment.checks import diagnose
from core.environment.interpreters import is_executable
from core.environment.known_good import APP_ROOT, BASE_FILE, NODEPS_FILE, known_good
from core.environment.report import Report
from core.errors import DanluError, InputError, MachineError
from core.files import read_json, write_json
from core.messages import message
from core.runs.child import TICK_SECONDS, end, follow
from core.runs.job import Progress

_PROBE: Final = Path(__file__).with_name("probe.py")
_LIMIT_SECONDS: Final = 600.0
_REPORT: Final = "environment_report.json"


def examine(python: Path, project_root: Path, progress: Progress, limit_seconds: float = _LIMIT_SECONDS) -> Report:
    """Run the probe in `python` and say what it means. Takes 10 to 60 seconds: torch is really imported.

    Raises InputError if `python` cannot be run, MachineError if the probe dies or takes longer than the limit.
    """
    if not is_executable(python):
        raise InputError("environment.not_a_python", path=str(python))
    command = [str(python), str(_PROBE), str(project_root)]
    output = _run(command, progress, limit_seconds)
    try:
        facts = json.loads(output.strip().splitlines()[-1])
    except (json.JSONDecodeError, IndexError) as error:
        raise MachineError("environment.probe_failed", python=str(python), reason=output[-400:] or "-") from error
    is_app_python = python.parent.parent.resolve() == Path(sys.prefix).resolve()
    lines = diagnose(facts, known_good(), is_app_python=is_app_python)
    return Report(str(python), datetime.now(UTC).isoformat(timespec="seconds"), lines, facts)


def run_examination(python: str, project_root: str, progress: Progress) -> dict[str, Any]:
    """Job: examine and keep the report in the project. Returns the counts of each colour."""
    report = examine(Path(python), Path(project_root), progress)
    write_json(report_file(Path(project_root)), report.to_json())
    return {"python": python, "status": str(report.status)}


def report_file(project_root: Path) -> Path:
    return project_root / ".danlu" / _REPORT


def last_report(project_root: Path) -> Report | None:
    """The report kept last; None if there is none or it is from another version of the app."""
    file = report_file(project_root)
    if not file.is_file():
        return None
    try:
        return Report.from_json(read_json(file))
    except (DanluError, KeyError, TypeError, ValueError):
        return None


def create_environment(target: str, python: str, progress: Progress) -> dict[str, Any]:
    """Job: an environment with the known-good set for `python`, built in the cache and linked at `target`.

    Goes on where an interrupted build stopped; `target` appears only when it is whole. Raises what
    `core.environment.venv.ensure` raises.
    """
    build_environment(python, BASE_FILE, NODEPS_FILE, progress, ["--link", target])
    return {"python": str(Path(target) / "bin" / "python")}


def build_environment(
    python: str, requirements: Path, nodeps: Path, progress: Progress, options: Sequence[str] = ()
) -> None:
    """`core.environment.venv ensure` under `python`, with what pip does in the progress. Raises what `ensure` raises."""
    if not is_executable(Path(python)):
        raise InputError("environment.not_a_python", path=python)
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        files = ["--requirements", str(requirements), "--no-deps", str(nodeps)]
        command = [python, "-m", "core.environment.venv", "ensure", *files, *options, "--error-file", str(error_file)]
        code = _follow_pip(command, progress)
        if code:
            if error_file.is_file():
                raise DanluError.from_json(read_json(error_file))
            raise MachineError("environment.pip_failed", code=code, reason="-")


def _run(command: list[str], progress: Progress, limit_seconds: float) -> str:
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, cwd="/", start_new_session=True)
        try:
            while process.poll() is None:
                progress.update(
                    time.monotonic() - began, None, message("environment.progress.probing", python=command[0])
                )
                if time.monotonic() - began > limit_seconds:
                    raise MachineError("environment.probe_slow", python=command[0], seconds=round(limit_seconds))
                time.sleep(TICK_SECONDS)
        finally:
            end(process)
        output.seek(0)
        return output.read().decode("utf-8", "replace")


def _follow_pip(command: list[str], progress: Progress) -> int:
    """Run `command` with its output passed on to the log, and say in the progress what pip does."""
    said, count = message("environment.progress.starting"), 0

    def listen(line: str) -> None:
        nonlocal said, count
        if line.startswith("Collecting "):
            count += 1
            said = message("environment.progress.collecting", name=line.split()[1][:60])
        elif line.startswith("Installing collected"):
            said = message("environment.progress.installing")

    return follow(command, listen, lambda: progress.update(count, None, said), cwd=APP_ROOT)
