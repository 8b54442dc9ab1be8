"""Submits a run's batch file and watches the job until it is over: `python -m core.launchers.slurm_agent RUN_DIR`.

Stands where torchrun stands in a local run: it lives as long as the job, ends with its exit code, and SIGTERM ends the job. What
Slurm says of the job is kept in slurm.json, for the page. A second agent for the same run watches the job that is there.
"""

import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError, JobError, MachineError
from core.files import read_json, write_json
from core.i18n import catalog
from core.launchers import slurm
from core.launchers.slurm import SlurmJob
from core.runs.directory import RunDirectory

_POLL_SECONDS: Final = 2.0
_PATIENCE_SECONDS: Final = 3600.0
"""How long a controller may be silent: the job goes on without it."""
_EXIT_EXPLAINED: Final = 3
_EXIT_CANCELLED: Final = 143
_EXPLAINED: Final = {
    "TIMEOUT": "slurm.time_limit",
    "NODE_FAIL": "slurm.node_failed",
    "OUT_OF_MEMORY": "slurm.out_of_memory",
    "PREEMPTED": "slurm.preempted",
    "BOOT_FAIL": "slurm.node_failed",
    "DEADLINE": "slurm.time_limit",
}


class _Told(Exception):
    """SIGTERM: a person cancels the run."""


def main(argv: list[str]) -> int:
    run = RunDirectory(Path(argv[0]))
    signal.signal(signal.SIGTERM, _tell)
    job_id = None
    try:
        job_id = _job_of(run)
        job = _watch(run, job_id)
        return _result(run, job)
    except _Told:
        if job_id:
            slurm.cancel(job_id)
        return _EXIT_CANCELLED
    except DanluError as error:
        return _explain(run, error)


def _tell(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Told


def _job_of(run: RunDirectory) -> str:
    """The job that was submitted before, or a new one."""
    file = run.path / slurm.JOB_FILE
    if file.exists() and not read_json(file)["is_over"]:
        return str(read_json(file)["id"])
    job_id = slurm.submit(run.path / slurm.BATCH_FILE)
    _say(f"submitted as Slurm job {job_id}")
    write_json(file, {"id": job_id, "state": "PENDING", "is_over": False, "at": time.time()})
    return job_id


def _watch(run: RunDirectory, job_id: str) -> SlurmJob:
    """Poll until the job is over. A stop that is asked for while it waits takes it out of the queue."""
    last: SlurmJob | None = None
    answered_at = time.monotonic()
    while True:
        try:
            job = slurm.read_job(job_id)
            answered_at = time.monotonic()
        except MachineError:
            if time.monotonic() - answered_at > _PATIENCE_SECONDS:
                raise
            time.sleep(_POLL_SECONDS)
            continue
        if job is None:
            raise JobError("slurm.forgotten", job=job_id)
        if job != last:
            _note(run, job, last)
        if job.is_over:
            return job
        if job.is_pending and run.stop_file.exists():
            slurm.cancel(job_id)
        last = job
        time.sleep(_POLL_SECONDS)


def _note(run: RunDirectory, job: SlurmJob, last: SlurmJob | None) -> None:
    value: dict[str, Any] = {**asdict(job), "is_over": job.is_over, "is_pending": job.is_pending, "at": time.time()}
    write_json(run.path / slurm.JOB_FILE, value)
    if last is None or (job.state, job.reason) != (last.state, last.reason):
        _say(f"Slurm job {job.id}: {job.state}{f' ({job.reason})' if job.reason else ''} {job.nodes}".rstrip())


def _result(run: RunDirectory, job: SlurmJob) -> int:
    if job.state == "COMPLETED":
        return 0
    if job.state == "CANCELLED" and run.stop_file.exists():
        return _EXIT_CANCELLED if job.nodes else 0  # Never given a node, it had nothing to save.
    if code := _EXPLAINED.get(job.state):
        return _explain(run, JobError(code, job=job.id, nodes=job.nodes or "–"))
    if job.state == "CANCELLED":
        return _explain(run, JobError("slurm.cancelled_outside", job=job.id))
    return job.exit_code or 1


def _explain(run: RunDirectory, error: DanluError) -> int:
    what, next_step = catalog("en").explain(error)
    print(f"{error.code}: {what} {next_step}", file=sys.stderr, flush=True)
    write_json(run.error_file, error.to_json())
    return _EXIT_EXPLAINED


def _say(line: str) -> None:
    print(f"danlu: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
