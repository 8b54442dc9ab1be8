"""Makes a run directory and starts its supervisor, detached. Knows no engine: the spec's argv says what runs."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from core.errors import ConflictError, MachineError
from core.files import free_path, write_json
from core.project import Project
from core.runs.alone import alone
from core.runs.directory import RunDirectory, RunSpec
from core.runs.processes import RUN_VARIABLE
from core.runs.state import SUPERVISOR_MODULE

_APP_ROOT: Final = Path(__file__).parents[2]
_START_SECONDS: Final = 60.0
_EXIT_SUPERVISED: Final = 4
"""The supervisor's exit code when another one has the run."""


def new_id(kind: str, parent: Path) -> str:
    """A folder name that is free in `parent`: `<kind>_<YYYYmmdd_HHMMSS>`, local time."""
    return free_path(parent / f"{kind}_{datetime.now().astimezone():%Y%m%d_%H%M%S}").name


def new_folder(kind: str, parent: Path) -> RunDirectory:
    """A folder of its own: two people who start something in the same second get two."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        run = RunDirectory(parent / new_id(kind, parent))
        with suppress(FileExistsError):
            run.path.mkdir()
            return run


def now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def launch(parent: Path, spec: RunSpec) -> RunDirectory:
    """Write run.json into the new folder `parent/spec.id` (or one already made for it) and start the supervisor in its own session.

    The caller returns at once; nothing passes through a pipe. Raises MachineError if the folder cannot be written, ConflictError if
    there is a run in it already: a second server was faster.
    """
    run = RunDirectory(parent.absolute() / spec.id)
    with alone(run, run.supervisor_lock):  # nobody runs it either: the lock is the supervisor's own
        if run.spec_file.exists():
            raise ConflictError("runs.already_started", run=run.id)
        write_json(run.spec_file, spec.to_json())
    start_supervisor(run)
    return run


def start_supervisor(run: RunDirectory, *, is_adopting: bool = False) -> None:
    """Start the supervisor of `run`, or one that takes over a run whose supervisor was killed. Returns once it stands.

    The process started here ends at once and leaves the supervisor to init, so the server has no child to wait for.
    Raises MachineError if the supervisor cannot begin, ConflictError if the run has one already.
    """
    environment = {name: value for name, value in os.environ.items() if name != RUN_VARIABLE}
    log_file = run.path / "supervisor.log"
    try:
        with open(log_file, "ab") as log:
            code = subprocess.run(
                [sys.executable, "-m", SUPERVISOR_MODULE, *(["--adopt"] if is_adopting else []), str(run.path)],
                cwd=_APP_ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                timeout=_START_SECONDS,
                check=False,
            ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("runs.no_supervisor", path=str(log_file), reason=str(error)) from error
    if code == _EXIT_SUPERVISED and is_adopting:
        return  # another tab or server asked for the same at the same time
    if code == _EXIT_SUPERVISED:
        raise ConflictError("runs.already_started", run=run.id)
    if code:
        raise MachineError("runs.no_supervisor", path=str(log_file), reason=f"exit code {code}")


def start_job(
    project: Project,
    function: str,
    *,
    kind: str,
    title: str,
    arguments: Mapping[str, Any],
    gpus: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> RunDirectory:
    """Start `function` ("core.models.library:copy_model") with `arguments` (JSON types) as a supervised job of `project`."""
    run = new_folder(kind, project.jobs)
    spec = RunSpec(
        id=run.id,
        kind=kind,
        title=title,
        argv=[python, "-m", "core.runs.job", str(run.path)],
        cwd=str(_APP_ROOT),
        env=dict(env or {}),
        gpus=list(gpus),
        created_at=now_utc(),
        stop_seconds=20.0,
        details={"function": function, "arguments": dict(arguments)},
    )
    return launch(project.jobs, spec)
