"""Finds the fastest way to train a config on a card for the same effective batch, by measuring.

A job: `start_autotune` → `measure`, each setting a few seconds in a process of its own. `speed_table` knows the result. Imports no engine.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from core.config.library import read_config
from core.config.source import ConfigSource
from core.errors import DanluError
from core.files import read_json, write_json
from core.messages import message
from core.project import Project, open_project
from core.runs.directory import RunDirectory
from core.runs.job import Progress
from core.runs.launch import now_utc, start_job
from core.runs.speed_table import Measured, Setting, card_name, key_of, model_folder, remember, setting_of
from core.xtuner.command import free_port, training_env

KIND: Final = "speed"
_MEASURED_SECONDS: Final = 90.0
_SETTING_SECONDS: Final = 8.0
_MOST_SETTINGS: Final = 9
_SETTING_LIMIT_SECONDS: Final = 240.0
"""Loading and warm-up included."""
_EXCEPTION: Final = re.compile(r"^(\[\w+\]: )?[\w.]*(Error|Exception)\b")


def start_autotune(project: Project, config: Path, *, gpu: str | None, python: str | None = None) -> RunDirectory:
    """Measure as a job. gpu: UUID or index, None: the CPU. Raises InputError for a config that has no local model."""
    source = ConfigSource(read_config(config))
    key_of(project, source, card=card_name(gpu))
    arguments = {"project": str(project.root), "config": str(config), "gpu": gpu, "python": python or sys.executable}
    return start_job(
        project, "core.runs.autotune:measure", kind=KIND, title=config.stem, arguments=arguments,
        gpus=[gpu] if gpu else [],
    )  # fmt: skip


def measure(project: str, config: str, gpu: str | None, python: str, progress: Progress) -> dict[str, Any]:
    """The job: measures settings until nothing is left to try or the time is used, and remembers the table."""
    place = open_project(Path(project))
    source = ConfigSource(read_config(Path(config)))
    started = setting_of(source)
    rows: list[Measured] = []
    for number, setting in enumerate(_worth_measuring(started, rows, length=int(source.effective("max_length", 2048)))):
        spent = sum(row.measured_seconds for row in rows)
        if number >= _MOST_SETTINGS or spent > _MEASURED_SECONDS - _SETTING_SECONDS:
            break
        progress.update(number, _MOST_SETTINGS, message("speed.tune.measuring", number=number + 1))
        rows.append(_measure(place, Path(config), source, setting, gpu=gpu, python=python, progress=progress))
    table = {"rows": [row.to_json() for row in rows], "at": now_utc(), "applied": False}
    key = key_of(place, source, card=card_name(gpu))
    remember(place, key, table)
    return table


def _worth_measuring(stock: Setting, rows: Sequence[Measured], *, length: int) -> Iterator[Setting]:
    """Settings in turn; what comes next depends on the rows measured so far."""
    yield stock
    fast = replace(stock, speed="auto")
    yield fast
    if "fast_pass" in rows[-1].parts:
        yield from _other_passes(fast, rows[-1], length)
    else:
        yield from _other_batches(stock, rows)


def _other_passes(fast: Setting, first: Measured, length: int) -> Iterator[Setting]:
    """Smaller and larger passes, and 4-bit weights left packed: all that changes the speed once the fast pass is in use."""
    micro = fast.batch_size * length
    chosen = first.tokens_per_pass or micro
    window = micro * fast.accumulation
    for tokens in (chosen // 2, chosen * 2, chosen * 4):
        if micro <= tokens <= window and tokens != chosen:
            yield replace(fast, speed={"parts": "auto", "tokens_per_pass": tokens})
    if "unpacked_weights" in first.parts:
        yield replace(fast, speed={"parts": [part for part in first.parts if part != "unpacked_weights"]})


def _other_batches(stock: Setting, rows: Sequence[Measured]) -> Iterator[Setting]:
    """Stock: larger micro-batches as long as they are faster, then the best one with checkpointing the other way."""
    last = rows[0].tokens_per_second or 0.0
    effective, batch = stock.batch_size * stock.accumulation, stock.batch_size * 2
    while batch <= effective and effective % batch == 0:
        yield replace(stock, batch_size=batch, accumulation=effective // batch)
        found = rows[-1].tokens_per_second
        if found is None or found < last:
            break
        last, batch = found, batch * 2
    best = max(
        (row for row in rows if row.setting.speed == "off"), key=lambda row: row.tokens_per_second or 0.0
    ).setting
    yield replace(best, checkpointing=not best.checkpointing)


def _measure(
    project: Project, config: Path, source: ConfigSource, setting: Setting, *, gpu: str | None, python: str,
    progress: Progress,
) -> Measured:  # fmt: skip
    """One setting in a process of its own, so that one that runs out of memory ends nothing else."""
    with tempfile.TemporaryDirectory(dir=_scratch(project), prefix="trial_") as name:
        folder = Path(name)
        asked = {
            "config": str(config), "setting": asdict(setting), "seconds": _SETTING_SECONDS,
            "model_type": _model_type(project, source), "model": str(model_folder(project, source)),
        }  # fmt: skip
        write_json(folder / "trial.json", asked)
        environment = training_env(gpus=[gpu] if gpu else [], world_size=1, is_local=True)
        with open(folder / "trial.log", "wb") as log:
            process = subprocess.Popen(
                [python, "-m", "core.xtuner.runtime.trial", str(folder)],
                cwd=project.root, env={**os.environ, **environment, "MASTER_PORT": str(free_port())},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                _wait(process, progress)
            finally:
                _end(process)
        return _result(folder, setting)


def _wait(process: subprocess.Popen[bytes], progress: Progress) -> None:
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < _SETTING_LIMIT_SECONDS:
        progress.check()
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(folder: Path, setting: Setting) -> Measured:
    if (folder / "result.json").is_file():
        return Measured(setting=setting, **read_json(folder / "result.json"))
    if (folder / "error.json").is_file():
        failure = DanluError.from_json(read_json(folder / "error.json")).code
    else:
        lines = (folder / "trial.log").read_text(encoding="utf-8", errors="replace").splitlines()
        # The exception's own line; what follows may be a long value that it prints.
        named = [line for line in lines if _EXCEPTION.search(line)]
        failure = (named or lines or ["?"])[-1]
    return Measured(setting=setting, tokens_per_second=None, failure=failure)


def _scratch(project: Project) -> Path:
    folder = project.private / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _model_type(project: Project, source: ConfigSource) -> str:
    return str(read_json(model_folder(project, source) / "config.json").get("model_type", ""))
