"""Training on a Slurm cluster: the batch file, and what Slurm says of a job. Speaks to sbatch, scontrol, squeue and scancel.

The run lies on a folder that all nodes share. A local process (`core.launchers.slurm_agent`) submits and watches the job, so a
run on a cluster is supervised, shown and stopped like any other. Near its time limit Slurm signals the batch file, which asks
the trainer to save and requeues the job; started again, it goes on from the newest whole checkpoint.
"""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from core.errors import InputError, JobError, MachineError
from core.launchers.local import Command
from core.xtuner.command import node_argv, training_env

BATCH_FILE: Final = "job.sbatch"
"""In the run's folder: what was submitted."""
JOB_FILE: Final = "slurm.json"
"""In the run's folder: what Slurm last said of the job."""
SAVE_REQUEST: Final = "requeue.request"
"""In the run's folder: the batch file asks the trainer to save and end, because the time limit is near."""
RESUME_VARIABLE: Final = "DANLU_RESUME"
"""Set by the batch file of a job that Slurm started again: the checkpoint to go on from."""
_TIMEOUT_SECONDS: Final = 30.0
_PENDING: Final = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING")
_RUNNING: Final = ("RUNNING", "COMPLETING", "STOPPED", "SIGNALING")
_FIELD: Final = re.compile(r"(\w+)=(\S*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmWish:
    """What a person asks Slurm for."""

    partition: str = ""
    """Empty: the cluster's default."""
    account: str = ""
    nodes: int = 1
    processes: int = 1
    """On each node, one for each GPU."""
    has_gpus: bool = True
    cpus_per_process: int = 4
    minutes: int = 720
    signal_seconds: int = 300
    """How long before the time limit the trainer is asked to save."""
    setup: str = ""
    """Lines before training: `module load …`, `source …/activate`, environment variables."""
    text: str = ""
    """The batch file, if a person edited it; empty: made from the above."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{key: value[key] for key in cls.__dataclass_fields__ if key in value})


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job as `scontrol show job` describes it."""

    id: str
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, TIMEOUT, …"""
    reason: str | None
    """Why it waits or failed, in Slurm's word: Resources, Priority, …"""
    nodes: str
    starts_at: str | None
    """Expected or actual start, the cluster's local time."""
    restarts: int
    exit_code: int
    signal: int
    position: int | None = None
    """Place among the waiting jobs of its partition, from 1."""

    @property
    def is_pending(self) -> bool:
        return self.state in _PENDING

    @property
    def is_over(self) -> bool:
        return self.state not in (*_PENDING, *_RUNNING)


def is_available() -> bool:
    """Whether this machine can submit jobs: sbatch is there and a controller answers."""
    try:
        return _run(["sinfo", "--noheader", "--format=%P"]).returncode == 0
    except MachineError:
        return False


def partitions() -> list[str]:
    """Names of the partitions, the default one first."""
    names = _checked(["sinfo", "--noheader", "--format=%P"]).split()
    unique = list(dict.fromkeys(names))
    return [name.rstrip("*") for name in sorted(unique, key=lambda name: not name.endswith("*"))]


def command(python: str, run_folder: Path) -> Command:
    """The local process that submits and watches; the training command is in the batch file."""
    return Command([python, "-m", "core.launchers.slurm_agent", str(run_folder)], training_env_of_agent())


def training_env_of_agent() -> dict[str, str]:
    """The agent imports only core; nothing of the training stack."""
    kept = training_env(gpus=(), world_size=1, is_local=True)
    return {name: kept[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED")}


def batch_text(wish: SlurmWish, python: str, run_folder: Path, root: Path, *, name: str, is_local: bool) -> str:
    """The batch file for a training run. `root`: the project, which is the working directory."""
    argv = node_argv(
        python,
        run_folder,
        nodes=wish.nodes,
        node_rank="$SLURM_NODEID",
        processes=wish.processes,
        address="$SLURM_LAUNCH_NODE_IPADDR",
        port="$DANLU_PORT",
    )
    gpus = [str(number) for number in range(wish.processes)] if wish.has_gpus else []
    cpus = wish.cpus_per_process * wish.processes
    env = training_env(gpus=gpus, world_size=wish.processes, is_local=is_local, cpu_count=cpus)
    if wish.has_gpus:
        del env["CUDA_VISIBLE_DEVICES"]  # Slurm says which GPUs are ours.
    return wrap(wish, argv, env, python=python, run_folder=run_folder, root=root, name=name)


def wrap(
    wish: SlurmWish,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    python: str,
    run_folder: Path,
    root: Path,
    name: str,
) -> str:
    """A batch file that runs `argv` once on each node, saves and requeues near the time limit, and resumes when started again."""
    options = {
        "job-name": name,
        "partition": wish.partition,
        "account": wish.account,
        "nodes": str(wish.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(wish.cpus_per_process * wish.processes),
        "gpus-per-node": str(wish.processes) if wish.has_gpus else "",
        "time": str(wish.minutes),
        "signal": f"B:USR1@{wish.signal_seconds}",
        "output": str(run_folder / "train.log"),
    }
    quoted = {key: f'"{value}"' if " " in value else value for key, value in options.items()}
    head = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in quoted.items() if value)]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in sorted(env.items())]
    inner = "exec " + " ".join(part if part.startswith("$") else shlex.quote(part) for part in argv)
    folder = shlex.quote(str(run_folder))
    body = _BODY.format(
        root=shlex.quote(str(root)),
        run=folder,
        save_request=SAVE_REQUEST,
        resume=RESUME_VARIABLE,
        python=shlex.quote(python),
        inner=shlex.quote(inner),
    )
    setup = wish.setup.strip()
    return "\n".join(
        [*head, "#SBATCH --requeue", "#SBATCH --open-mode=append", "", *exports, *([setup] if setup else []), body]
    )


_BODY: Final = """
cd {root}
export DANLU_RUN={run}
export DANLU_PORT=$((20000 + SLURM_JOB_ID % 20000))
rm -f "$DANLU_RUN/{save_request}"
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then
  export {resume}="$({python} -m core.launchers.newest "$DANLU_RUN")"
  echo "danlu: started again by Slurm, going on from ${{{resume}:-the beginning}}"
fi

# Slurm sends USR1 before the time limit: save, end, and wait in the queue for the next turn.
near_limit() {{ is_near=1; touch "$DANLU_RUN/{save_request}"; echo "danlu: the time limit is near, saving"; }}
trap near_limit USR1

srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c {inner} &
wait $!
code=$?
while [ $code -gt 128 ] && kill -0 $! 2>/dev/null; do wait $!; code=$?; done

if [ "${{is_near:-0}}" = 1 ] && [ $code -eq 0 ]; then
  rm -f "$DANLU_RUN/{save_request}"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60
fi
exit $code
"""


def submit(batch_file: Path) -> str:
    """Submit a batch file; the job's id. Raises JobError with what Slurm says if it refuses."""
    return _checked(["sbatch", "--parsable", str(batch_file)]).split(";")[0].strip()


def read_job(job_id: str) -> SlurmJob | None:
    """What Slurm says of a job now; None if it has forgotten it. Raises MachineError if no controller answers."""
    done = _run(["scontrol", "show", "job", "--oneliner", job_id])
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return None
        raise MachineError("slurm.no_answer", reason=done.stderr.strip()[:300])
    job = parse_job(done.stdout)
    return job if not job.is_pending else SlurmJob(**{**asdict(job), "position": _position(job_id)})


def cancel(job_id: str) -> None:
    """End a job, waiting or running."""
    _run(["scancel", job_id])


def parse_job(text: str) -> SlurmJob:
    """One line of `scontrol show job --oneliner`. Raises InputError if it is none."""
    fields: dict[str, str] = dict(_FIELD.findall(text))
    try:
        code, _, number = fields["ExitCode"].partition(":")
        return SlurmJob(
            id=fields["JobId"],
            state=fields["JobState"],
            reason=_known(fields.get("Reason")),
            nodes=_known(fields.get("NodeList")) or "",
            starts_at=_known(fields.get("StartTime")),
            restarts=int(fields.get("Restarts") or 0),
            exit_code=int(code),
            signal=int(number or 0),
        )
    except (KeyError, ValueError) as error:
        raise InputError("slurm.strange_answer", text=text.strip()[:200]) from error


def _position(job_id: str) -> int | None:
    """Slurm sorts waiting jobs by priority; the first is next."""
    listed = _run(["squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format=%i %P"]).stdout.splitlines()
    rows = [line.split() for line in listed if line.strip()]
    partition = next((row[1] for row in rows if row[0] == job_id and len(row) > 1), None)
    mine = [row[0] for row in rows if row[-1] == partition]
    return mine.index(job_id) + 1 if job_id in mine else None


def _known(value: str | None) -> str | None:
    return None if value in (None, "", "None", "(null)", "Unknown", "N/A") else value


def _checked(argv: Sequence[str]) -> str:
    done = _run(argv)
    if done.returncode:
        raise JobError("slurm.refused", command=argv[0], reason=(done.stderr or done.stdout).strip()[:500])
    return done.stdout


def _run(argv: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except FileNotFoundError as error:
        raise MachineError("slurm.missing", command=argv[0]) from error
    except subprocess.TimeoutExpired as error:
        raise MachineError("slurm.no_answer", reason=f"{argv[0]}: {_TIMEOUT_SECONDS:.0f} s") from error
