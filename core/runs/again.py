"""A run that ended goes on in its own folder, at the step of its last good checkpoint; or starts anew in another folder."""

import json
import math
import shutil
from dataclasses import replace
from typing import Final

from core.checkpoints.inspect import CheckpointCard
from core.errors import ConflictError, InputError, MachineError
from core.files import write_json
from core.project import Project
from core.runs.alone import alone
from core.runs.directory import RunDirectory
from core.runs.health import Alert
from core.runs.jobs import checkpoints_of
from core.runs.launch import launch, new_folder, now_utc, start_supervisor
from core.runs.state import Phase, read_attempt, read_status
from core.runs.versions import versions
from core.runs.watch import read_alerts
from core.xtuner.command import free_port

_BROKEN: Final = ("nan", "grad_nan")


def resume_point(run: RunDirectory) -> CheckpointCard | None:
    """The newest checkpoint that is whole, can be gone on from and was saved before the loss stopped being a number."""
    if not run.spec_file.exists():
        return None
    broken = [alert for alert in read_alerts(run)[0] if alert.kind in _BROKEN and alert.level == "error"]
    for card in checkpoints_of(run):
        if card.is_complete and card.has_optimizer and not any(_is_spoilt(card, alert) for alert in broken):
            return card
    return None


def go_on(run: RunDirectory) -> CheckpointCard:
    """Start `run` again in its own folder, from `resume_point`: the same curve goes on. Returns the checkpoint.

    Raises ConflictError while it runs, after it finished, or where another tab or server makes it go on just now; InputError if it
    has no checkpoint to go on from.
    """
    if not run.spec_file.exists():
        raise ConflictError("runs.not_ours", run=run.id)
    with alone(run, run.go_on_lock):  # until the supervisor stands: what a second one sees then is a run that lives
        return _go_on(run)


def _go_on(run: RunDirectory) -> CheckpointCard:
    status = read_status(run)
    if status.phase.is_active:
        raise ConflictError("runs.still_running", run=run.id)
    _require_own(run)
    if status.phase is Phase.FINISHED:
        raise ConflictError("runs.complete", run=run.id)
    card = resume_point(run)
    if card is None:
        raise InputError("runs.no_checkpoint", run=run.id)
    attempt = {
        "number": int(read_attempt(run).get("number", 1)) + 1,
        "resume": str(card.path),
        "iteration": card.iteration,
        "log_offset": run.log_file.stat().st_size if run.log_file.exists() else 0,
        "at": now_utc(),
    }
    write_json(run.attempt_file, attempt)
    for file in (run.stop_file, run.error_file, run.result_file):
        file.unlink(missing_ok=True)
    start_supervisor(run)
    return card


def retry(project: Project, run: RunDirectory) -> RunDirectory:
    """The same run once more from its beginning, in a new folder. Raises InputError if run.json or the config's copy is lost."""
    spec = run.spec()
    _require_own(run)
    if not run.source.is_dir():
        raise InputError("files.missing", path=str(run.source))
    try:
        again = new_folder(spec.kind, project.train)
        shutil.copytree(run.source, again.source)
        if run.watch_file.exists():
            shutil.copy2(run.watch_file, again.watch_file)
    except OSError as error:
        raise MachineError(
            "files.cannot_write", path=str(project.train), reason=error.strerror or str(error)
        ) from error
    argv = [str(again.path) if argument == str(run.path) else argument for argument in spec.argv]
    if "--master_port" in argv:
        argv[argv.index("--master_port") + 1] = str(free_port())
    details = {**spec.details, "versions": versions(spec.argv[0]), "retry_of": run.id}
    if details.get("slurm"):  # holds the text of the batch file, which names the folder
        details["slurm"] = json.loads(
            json.dumps(details["slurm"], ensure_ascii=False).replace(str(run.path), str(again.path))
        )
    return launch(project.train, replace(spec, id=again.id, argv=argv, created_at=now_utc(), details=details))


def _require_own(run: RunDirectory) -> None:
    """The command in the run.json of somebody else's archive is not started."""
    if run.imported_file.exists():
        raise ConflictError("runs.imported", run=run.id)


def _is_spoilt(card: CheckpointCard, alert: Alert) -> bool:
    """Whether the checkpoint was saved while loss or gradient were no numbers, or by the step just before that was seen."""
    is_saved_meanwhile = alert.since <= card.modified_at <= (alert.until or math.inf)
    first = alert.params.get("first") or alert.iteration
    return is_saved_meanwhile or (card.iteration is not None and first is not None and card.iteration == first - 1)
