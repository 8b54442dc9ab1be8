"""Tokenising before the ranks meet: rank 0 makes the data once, the others wait for its files and so in no collective.

Runs in the trainer's process; how far it is stands in the run's progress.json, and a stop is heeded. On several nodes the project's
folder is shared, so one process makes the data for all of them.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.errors import DanluError, InputError, MachineError
from core.files import read_json
from core.launchers.slurm import SAVE_REQUEST
from core.messages import message
from core.runs.directory import RunDirectory
from core.runs.job import Progress
from core.xtuner.runtime import failures, tokenised

_POLL_SECONDS: Final = 0.2


class Stopped(Exception):
    """A person, or the time limit of a cluster, ends the run before its first step."""


class _Steps(Progress):
    """Counts the passes over the data. They are XTuner's: mapping, template, tokens, filter, packing, lengths."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run)
        self._requests = (run.stop_file, run.path / SAVE_REQUEST)
        self.step = 0

    def rows(self, done: float, total: float | None) -> None:
        self.update(done, total, message("monitor.tokenising", step=self.step), unit="rows")

    def check(self) -> None:
        if any(file.exists() for file in self._requests):
            raise Stopped


def make_ready(datasets: list[Any], run: RunDirectory, *, rank: int, world_size: int, seed: int) -> None:
    """Returns when every one of these data sets can be had without tokenising. `datasets`: what `tokenised.use_cache` found.

    Raises Stopped, MachineError `train.tokenised_not_kept` if the other ranks could not read it from the disk, InputError
    `train.tokenising_failed` for whatever the data set's own code raised, and on the other ranks what rank 0 raised.
    """
    steps = _Steps(run)
    if rank:
        _wait(datasets, run, steps)
        return
    missing = [dataset for dataset in datasets if not tokenised.is_kept(Path(dataset["kept_in"]))]
    try:
        for dataset in missing:
            _keep(_make(dataset, steps, seed), Path(dataset["kept_in"]), is_shared=world_size > 1)
    finally:
        run.progress_file.unlink(missing_ok=True)
    if missing:
        folders = [Path(dataset["kept_in"]) for dataset in datasets]
        tokenised.tidy(folders[0].parent, {folder.name for folder in folders})


def _make(dataset: Any, steps: _Steps, seed: int) -> Any:
    """The data set as XTuner makes it. Seeded as its runner is, so that packing shuffles as it would in there."""
    from xtuner.registry import BUILDER

    options = {name: value for name, value in dataset.items() if name != "kept_in"}
    print("danlu: tokenising", flush=True)
    random.seed(seed)
    np.random.seed(seed)
    try:
        with _watched(steps):
            return BUILDER.build({**options, "type": "xtuner.dataset.process_hf_dataset"})
    except (Stopped, DanluError):
        raise
    except Exception as error:
        explained = failures.explain(error)
        failures.print_traceback(error)
        if explained is not None:
            raise explained from error
        raise InputError("train.tokenising_failed", reason=f"{type(error).__name__}: {error}"[:500]) from error


def _keep(made: Any, folder: Path, *, is_shared: bool) -> None:
    error = tokenised.keep(made, folder)
    if error is None:
        return
    if is_shared:
        raise MachineError("train.tokenised_not_kept", path=str(folder.parent), reason=str(error)) from error
    tokenised.hold(made, folder)


@contextmanager
def _watched(steps: _Steps) -> Iterator[None]:
    """Let the library's own progress bars, which count rows, tell `steps` too."""
    from datasets import arrow_dataset

    bar_class = arrow_dataset.hf_tqdm

    class Bar(bar_class):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._rows, self._all = options.get("initial") or 0, options.get("total")
            steps.step += 1
            steps.rows(self._rows, self._all)

        def update(self, n: float | None = 1) -> Any:
            self._rows += n or 0
            steps.rows(self._rows, self._all)
            return super().update(n)

    steps.check()
    arrow_dataset.hf_tqdm = Bar
    try:
        yield
    finally:
        arrow_dataset.hf_tqdm = bar_class


def _wait(datasets: list[Any], run: RunDirectory, steps: _Steps) -> None:
    """Until rank 0 has put all of it there. If rank 0 ends without a word, torchrun ends this process too."""
    while not all(tokenised.is_kept(Path(dataset["kept_in"])) for dataset in datasets):
        steps.check()
        if run.error_file.exists():
            raise DanluError.from_json(read_json(run.error_file))
        time.sleep(_POLL_SECONDS)
