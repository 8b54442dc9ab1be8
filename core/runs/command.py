"""The command that starts a training: on this machine, on several, through Slurm, or with an old XTuner. Starts nothing."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config.deepspeed import RUN_FILE, Setting
from core.environment.interpreters import is_legacy
from core.launchers import local, slurm
from core.launchers.nodes import local_argv, node_env
from core.project import Project
from core.runs.request import TrainRequest
from core.xtuner.legacy import legacy_argv


def start_command(
    request: TrainRequest, folder: Path, setting: Setting | None, resume: str | None, *, is_local: bool
) -> local.Command:
    """Argv and environment that train in `folder`. `is_local`: neither model nor data is fetched; `resume`: a checkpoint."""
    started = _started(request, folder, is_local=is_local)
    if not is_legacy(Path(request.python)):
        return started
    return replace(started, argv=_legacy_argv(started.argv, request, setting, resume))


def batch(project: Project, request: TrainRequest, folder: Path, *, is_local: bool) -> dict[str, Any] | None:
    """What was asked of Slurm, with the batch file as it will be submitted."""
    wish = request.slurm
    if wish is None:
        return None
    made = slurm.batch_text(wish, request.python, folder, project.root, name=folder.name, is_local=is_local)
    return replace(wish, text=wish.text or made).to_json()


def tool_python(request: TrainRequest) -> str:
    """The Python for the app's own work with torch: the one that trains, unless it is too old for the app's code."""
    return sys.executable if is_legacy(Path(request.python)) else request.python


def _started(request: TrainRequest, folder: Path, *, is_local: bool) -> local.Command:
    if request.slurm:
        return slurm.command(sys.executable, folder)
    if request.nodes:
        argv = local_argv(request.python, folder)
        return local.Command(argv, node_env(request.nodes, is_local=is_local))
    return local.command(request.python, folder, gpus=request.gpus, world_size=request.world_size, is_local=is_local)


def _legacy_argv(argv: list[str], request: TrainRequest, setting: Setting | None, resume: str | None) -> list[str]:
    """The command for XTuner 0.1.x, which trains without the app's hooks. Its last argument but the options is the run's folder."""
    folder = Path(argv[-1])
    config = folder / "source" / f"{request.config.stem}.py"
    needs_group = request.world_size > 1 or request.deepspeed is not None
    # Its own settings by name: another version may have changed them.
    is_own = setting is not None and setting.is_own
    named = str(folder / RUN_FILE) if is_own else request.deepspeed
    return legacy_argv(argv, config, deepspeed=named, resume=resume, seed=request.seed, needs_group=needs_group)
