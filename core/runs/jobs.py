"""Finds runs, their checkpoints and jobs of a project on the disk. Knows their places and kinds, not what they do.

A project may lie on a network share, where every look asks the server: a run costs one look, they are made at once, and what has not
changed since (run.json never does) is read once.
"""

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from core.checkpoints.inspect import CheckpointCard, list_checkpoints
from core.errors import DanluError, InputError
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.pace import ask_all
from core.runs.state import read_status

_KINDS_KEPT: Final = 10_000
_RUNS_KEPT: Final = 1000
_CHECKPOINT_NAMES: Final = ("iter_", "epoch_")
"""How the names of checkpoints begin; what else begins so only costs a look."""
Version = tuple[int, ...]
"""Of a file: another one after each change."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A training run, as the look at its folder found it."""

    run: RunDirectory
    version: Version
    """Of its run.json; empty for a work dir made by hand."""

    def spec(self) -> RunSpec | None:
        """What run.json says; None for a work dir made by hand, or where it cannot be read."""
        try:
            return _spec_as_it_was(self.run, self.version) if self.version else None
        except DanluError:
            return None


def list_jobs(project: Project, kinds: Collection[str] | None = None) -> list[RunDirectory]:
    """Jobs of `project` (of these kinds, or all), the latest first. One whose run.json is broken belongs to no kind."""
    jobs = [
        (job, spec) for job, spec in _with_spec(_folders(project.jobs)) if kinds is None or _kind(job, spec) in kinds
    ]
    return [job for job, _ in sorted(jobs, key=lambda found: (found[1].st_mtime, found[0].id), reverse=True)]


def active_jobs(project: Project, kinds: Collection[str] | None = None) -> list[RunDirectory]:
    """Jobs that wait, run or are being stopped, the latest first."""
    return active_of(list_jobs(project, kinds))


def latest_job(project: Project, kinds: Collection[str]) -> RunDirectory | None:
    """The job of these kinds that was started last, whatever became of it."""
    return next(iter(list_jobs(project, kinds)), None)


def list_runs(project: Project) -> list[RunDirectory]:
    """Training runs, the latest first: those of the app, and work dirs made by hand with `xtuner train`."""
    return [listed.run for listed in look_at_runs(project)]


def look_at_runs(project: Project) -> list[Listed]:
    """As list_runs, with what lets one look do for the rest.

    As in the guide, `--work-dir` may be `train/` itself, a folder in it, or one beside it such as `train_deepspeed/`.
    """
    in_train = _folders(project.train)
    dated = [(spec.st_mtime, run.id, Listed(run, version_of(spec))) for run, spec in _with_spec(in_train)]
    ours = {listed.run.path for *_, listed in dated}
    by_hand = _work_dirs(project, [path for path in in_train if path not in ours])
    dated += [(*_changed(run), Listed(run, ())) for run in by_hand]
    return [listed for *_, listed in sorted(dated, key=lambda one: one[:2], reverse=True)]


def active_runs(project: Project) -> list[RunDirectory]:
    """Training runs that wait, run or are being stopped, the latest first."""
    return active_of(list_runs(project))


def active_of(runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    """Those of `runs` that wait, run or are being stopped."""
    return [run for run, status in zip(runs, ask_all(read_status, runs), strict=True) if status.phase.is_active]


def project_checkpoints(runs: Iterable[RunDirectory]) -> list[CheckpointCard]:
    """Checkpoints of all these training runs, damaged ones too, newest first. Opens headers only."""
    cards = [card for run in set(runs) for card in checkpoints_of(run)]
    return sorted(cards, key=lambda card: card.modified_at, reverse=True)


def checkpoints_of(run: RunDirectory) -> list[CheckpointCard]:
    """As `list_checkpoints`; headers are opened again only when a checkpoint has come, gone or changed.

    Where one is damaged, each time: it may be the disk that is.
    """
    cards = _cards_as_they_were(run, tuple(sorted(_checkpoint_versions(run.path))))
    return list(cards) if all(card.is_complete for card in cards) else list_checkpoints(run.path)


def version_of(status: os.stat_result) -> Version:
    """Two changes within one tick of the file system's clock have the same time, but another size or inode.

    What is copied with the time of its source, or allowed to be read, has another time of change.
    """
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


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
    try:
        return _kind_as_it_was(run, version_of(spec))
    except DanluError:
        return None


@lru_cache(maxsize=_KINDS_KEPT)
def _kind_as_it_was(run: RunDirectory, version: Version) -> str:
    """Raises DanluError for one that cannot be read now, which is not remembered: it may be the disk that is to blame."""
    del version  # a run.json never changes; another one in its place is another version
    return run.spec().kind


@lru_cache(maxsize=_RUNS_KEPT)
def _spec_as_it_was(run: RunDirectory, version: Version) -> RunSpec:
    """Raises as above."""
    del version
    return run.spec()


@lru_cache(maxsize=_RUNS_KEPT)
def _cards_as_they_were(run: RunDirectory, versions: tuple[tuple[str, Version], ...]) -> tuple[CheckpointCard, ...]:
    return tuple(list_checkpoints(run.path)) if versions else ()


def _checkpoint_versions(folder: Path) -> Iterator[tuple[str, Version]]:
    """What may be a checkpoint in `folder`, and in one that is a folder itself (DeepSpeed's) each of its files."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_CHECKPOINT_NAMES)]  # noqa: PTH208 - names will do
    except OSError:
        return
    for name in names:
        yield from _versions_below(folder / name)


def _versions_below(path: Path) -> Iterator[tuple[str, Version]]:
    try:
        status = path.stat()
        inside = list(path.iterdir()) if stat.S_ISDIR(status.st_mode) else []
    except OSError:
        return  # it is being removed
    yield str(path), version_of(status)
    for each in inside:
        yield from _versions_below(each)


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
