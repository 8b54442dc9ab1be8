"""Finds runs, their checkpoints and jobs of a project on the disk. Knows their places and kinds, not what they do.

A project may lie on a network share, where every look asks the server: a run costs one look, they are made at once, and run.json is
read once.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from core.checkpoints.inspect import CheckpointCard, list_checkpoints
from core.errors import DanluError, InputError
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.pace import ask_all
from core.runs.state import read_status

_KINDS_KEPT: Final = 10_000


def list_jobs(project: Project, kinds: Collection[str] | None = None) -> list[RunDirectory]:
    """Jobs of `project` (of these kinds, or all), the latest first. One whose run.json is broken belongs to no kind."""
    jobs = [
        (job, spec) for job, spec in _with_spec(_folders(project.jobs)) if kinds is None or _kind(job, spec) in kinds
    ]
    return [job for job, _ in sorted(jobs, key=lambda found: (found[1].st_mtime, found[0].id), reverse=True)]


def active_jobs(project: Project, kinds: Collection[str] | None = None) -> list[RunDirectory]:
    """Jobs that wait, run or are being stopped, the latest first."""
    return _active(list_jobs(project, kinds))


def latest_job(project: Project, kinds: Collection[str]) -> RunDirectory | None:
    """The job of these kinds that was started last, whatever became of it."""
    return next(iter(list_jobs(project, kinds)), None)


def list_runs(project: Project) -> list[RunDirectory]:
    """Training runs, the latest first: those of the app, and work dirs made by hand with `xtuner train`.

    As in the guide, `--work-dir` may be `train/` itself, a folder in it, or one beside it such as `train_deepspeed/`.
    """
    in_train = _folders(project.train)
    dated = [(spec.st_mtime, run.id, run) for run, spec in _with_spec(in_train)]
    ours = {run.path for *_, run in dated}
    dated += [(*_changed(run), run) for run in _work_dirs(project, [path for path in in_train if path not in ours])]
    return [run for *_, run in sorted(dated, key=lambda one: one[:2], reverse=True)]


def active_runs(project: Project) -> list[RunDirectory]:
    """Training runs that wait, run or are being stopped, the latest first."""
    return _active(list_runs(project))


def project_checkpoints(project: Project) -> list[CheckpointCard]:
    """Checkpoints of all training runs of this project, damaged ones too, newest first. Opens headers only."""
    folders = {run.path for run in list_runs(project)}
    cards = [card for folder in folders for card in list_checkpoints(folder)]
    return sorted(cards, key=lambda card: card.modified_at, reverse=True)


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


def _active(runs: list[RunDirectory]) -> list[RunDirectory]:
    return [run for run, status in zip(runs, ask_all(read_status, runs), strict=True) if status.phase.is_active]


def _with_spec(folders: Sequence[Path]) -> list[tuple[RunDirectory, os.stat_result]]:
    """Those of `folders` that are run directories, with what the disk says of their run.json."""
    runs = [RunDirectory(folder) for folder in folders]
    return [(run, spec) for run, spec in zip(runs, ask_all(_look, runs), strict=True) if spec is not None]


def _look(run: RunDirectory) -> os.stat_result | None:
    try:
        return run.spec_file.stat()
    except OSError:
        return None  # no run, or one that is being deleted


def _kind(run: RunDirectory, spec: os.stat_result) -> str | None:
    return _kind_as_it_was(run, spec.st_ino, spec.st_mtime_ns, spec.st_size)


@lru_cache(maxsize=_KINDS_KEPT)
def _kind_as_it_was(run: RunDirectory, *version: int) -> str | None:
    del version  # a run.json never changes; another one in its place is another version
    return kind_of(run)


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [parent / entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _work_dirs(project: Project, in_train: list[Path]) -> list[RunDirectory]:
    """Folders that hold XTuner's own log and no run.json. `in_train`: the folders of train/ that are no runs of ours."""
    known = (
        project.train, project.data, project.model, project.config, project.huggingface, project.final_model,
        project.private,
    )  # fmt: skip
    beside = [folder for folder in _folders(project.root) if folder not in known]
    found = [
        folder
        for folder in [*beside, *in_train, *_folders(project.root / "work_dirs")]
        if _has_scalars(_folders(folder))
    ]
    if _has_scalars(in_train):
        found.append(project.train)
    return [RunDirectory(folder) for folder in found if not (folder / "run.json").exists()]


def _has_scalars(starts: Iterable[Path]) -> bool:
    """Whether one of these folders is that of a start of XTuner, which it names by the time."""
    return any((start / "vis_data/scalars.json").exists() for start in starts)


def _changed(run: RunDirectory) -> tuple[float, str]:
    try:
        return run.path.stat().st_mtime, run.id
    except OSError:
        return 0.0, run.id
