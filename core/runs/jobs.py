"""Finds runs and jobs of a project on the disk. Knows their places and kinds, not what they do."""

from collections.abc import Collection
from pathlib import Path

from core.errors import DanluError, InputError
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.state import read_status


def list_jobs(project: Project, kinds: Collection[str] | None = None) -> list[RunDirectory]:
    """Jobs of `project` (of these kinds, or all), the latest first. One whose run.json is broken belongs to no kind."""
    jobs = [RunDirectory(file.parent) for file in project.jobs.glob("*/run.json")]
    chosen = [job for job in jobs if kinds is None or kind_of(job) in kinds]
    return sorted(chosen, key=_created, reverse=True)


def active_jobs(project: Project, kinds: Collection[str] | None = None) -> list[RunDirectory]:
    """Jobs that wait, run or are being stopped, the latest first."""
    return [job for job in list_jobs(project, kinds) if read_status(job).phase.is_active]


def latest_job(project: Project, kinds: Collection[str]) -> RunDirectory | None:
    """The job of these kinds that was started last, whatever became of it."""
    return next(iter(list_jobs(project, kinds)), None)


def list_runs(project: Project) -> list[RunDirectory]:
    """Training runs, the latest first: those of the app, and work dirs made by hand with `xtuner train`.

    As in the guide, `--work-dir` may be `train/` itself, a folder in it, or one beside it such as `train_deepspeed/`.
    """
    ours = [RunDirectory(file.parent) for file in project.train.glob("*/run.json")]
    return sorted([*ours, *_work_dirs(project)], key=_created, reverse=True)


def active_runs(project: Project) -> list[RunDirectory]:
    """Training runs that wait, run or are being stopped, the latest first."""
    return [run for run in list_runs(project) if read_status(run).phase.is_active]


def find_run(project: Project, run_id: str) -> RunDirectory:
    """The training run with this id. Raises InputError if there is none."""
    for run in list_runs(project):
        if run.id == run_id:
            return run
    raise InputError("runs.unknown", run=run_id, path=str(project.train))


def is_ours(run: RunDirectory) -> bool:
    """Whether the app made it. Work dirs made by hand are only read."""
    return run.spec_file.exists()


def kind_of(run: RunDirectory) -> str | None:
    """`train`, `copy`, `merge`, …; None if run.json cannot be read."""
    try:
        return run.spec().kind
    except DanluError:
        return None


def _work_dirs(project: Project) -> list[RunDirectory]:
    found: set[Path] = set()
    for pattern in (
        "*/*/vis_data/scalars.json",
        "train/*/*/vis_data/scalars.json",
        "work_dirs/*/*/vis_data/scalars.json",
    ):
        found |= {file.parents[2] for file in project.root.glob(pattern)}
    return [RunDirectory(path) for path in found if not (path / "run.json").exists()]


def _created(run: RunDirectory) -> tuple[float, str]:
    for file in (run.spec_file, run.path):
        try:
            return file.stat().st_mtime, run.id
        except OSError:
            continue
    return 0.0, run.id
