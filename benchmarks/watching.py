"""What watching costs a training: one run on one GPU whose windows are watched and unwatched in turn, and their step times in pairs.

`python -m benchmarks.watching [--shape 1.8b] [--speed auto] [--seconds 145]`; with `--shape tiny` it runs on the CPU. Watched: the
supervisor with its sampler and its health checks, NVML asked every second beside that, and pages that refresh every second (see
`benchmarks.training.watcher`). Unwatched: the same processes, stopped (SIGSTOP). Nothing else changes: the same process trains
with the same data on the same card, and the order of the two turns round from pair to pair, so that warmth and drift cancel.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.result import NoGpu, Result
from benchmarks.training import ranks
from benchmarks.training.case import make_model_folder
from benchmarks.training.ranks import Setting
from core.config.source import ConfigSource
from core.files import read_json
from core.gpu import devices
from core.runs import processes
from core.runs.control import request_stop
from core.runs.devices import FOLDER_VARIABLE
from core.runs.directory import RunDirectory
from core.runs.state import read_status

_ROOT: Final = Path(__file__).parents[1]
_PAGES: Final = 2
_WARM_STEPS: Final = 6
_SETTLE_SECONDS: Final = 0.5
"""After a change: what was held up is made up for, and counts for neither side."""
_WINDOW_SECONDS: Final = 5.0
_END_SECONDS: Final = 15.0
"""Kept back for the end of the run."""
_START_SECONDS: Final = 100.0
_ENDLESS: Final = 10**7
_RESAMPLES: Final = 2000
_LIMIT_PERCENT: Final = 0.5


@dataclass(frozen=True, slots=True)
class Window:
    """Unix seconds from and to which the run was watched, or was not."""

    is_watched: bool
    begins_at: float
    ends_at: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A window, and the optimizer steps that lie in it as a whole."""

    is_watched: bool
    step_seconds: float
    """Their mean: what watching does comes once a second, and a median would not see it."""
    steps: int


def run() -> Result:
    """In InternLM2-1.8B's shape with LoRA. Raises NoGpu without a GPU."""
    if not devices():
        raise NoGpu("needs an NVIDIA GPU")
    return measure("1.8b", "auto", 145.0)


def measure(shape: str, speed: str, seconds: float, window_seconds: float = _WINDOW_SECONDS) -> Result:
    """Train for about `seconds` in all, most of it in windows. Without a GPU the figures say how it works, and aim at nothing."""
    deadline = time.monotonic() + seconds
    cards = [device.uuid or str(device.index) for device in devices()][:1]
    sizes = {"length": 64} if shape == "tiny" else {}
    setting = Setting(name="watched", gpus=tuple(cards), shape=shape, speed=speed, steps=16, batches=4, **sizes)  # type: ignore[arg-type]
    with _home() as home:
        model = make_model_folder(shape, Path(tempfile.gettempdir()) / f"danlu_bench_{shape}")
        text = ranks.write_config(setting, model, home / setting.name)
        text = ConfigSource(text).set("train_cfg.max_iters", _ENDLESS).text  # it is ended when the time is over
        started = ranks.begin(setting, model, home, text=text)
        try:
            warm = setting.accumulation * _WARM_STEPS
            if not ranks.wait_for_iteration(started, warm, seconds=min(_START_SECONDS, seconds - _END_SECONDS)):
                raise RuntimeError(f"no {warm} steps: {ranks.wait(started, setting, seconds=0).error}")
            windows, done = _watch_by_turns(started, home, window_seconds, deadline - _END_SECONDS)
        finally:
            _end(started, setting)
        lines = ranks.read_lines(started.metrics_file)
        supervised = len(ranks.read_lines(started.gpu_file))
    found = [measured(window, lines, setting.accumulation) for window in windows]
    for window in found:
        print(window, file=sys.stderr, flush=True)
    figures = {
        "shape": shape, "speed": speed, "card": next((device.name for device in devices()), "cpu"), "pages": _PAGES,
        **compare(found),
        **{f"watcher_{name}": value for name, value in done.items()}, "supervisor_samples": supervised,
    }  # fmt: skip
    return Result(figures, {"cost_percent": ("<", _LIMIT_PERCENT)} if cards else {})


def measured(window: Window, lines: list[dict[str, Any]], accumulation: int) -> Measured | None:
    """The mean optimizer step of a window; None if fewer than two ends lie in it."""
    ends = [
        line["at"]
        for line in lines
        if line["iteration"] % accumulation == 0 and window.begins_at <= line["at"] <= window.ends_at
    ]
    if len(ends) < 2:
        return None
    return Measured(window.is_watched, (ends[-1] - ends[0]) / (len(ends) - 1), len(ends) - 1)


def compare(windows: list[Measured | None]) -> dict[str, float | int | None]:
    """What watching adds to a step: median over pairs of neighbours, its 95 % interval, and how far equal neighbours differ."""
    pairs = [(one, two) for one, two in zip(windows[::2], windows[1::2], strict=False) if one and two]
    costs = [_change(*sorted(pair, key=lambda window: window.is_watched)) for pair in pairs]
    alike = [(one, two) for one, two in zip(windows[1::2], windows[2::2], strict=False) if one and two]
    noise = [abs(_change(one, two)) for one, two in alike if one.is_watched == two.is_watched]
    low, high = _interval(costs)
    figures: dict[str, float | int | None] = {
        "pairs": len(costs),
        "steps": sum(window.steps for window in windows if window),
        "cost_percent": round(statistics.median(costs), 3) if costs else None,
        "cost_low_percent": low,
        "cost_high_percent": high,
        "noise_percent": round(statistics.median(noise), 3) if noise else None,
    }
    for name, is_watched in (("unwatched", False), ("watched", True)):
        seconds = [window.step_seconds for window in windows if window and window.is_watched is is_watched]
        figures[f"{name}_step_milliseconds"] = round(1000 * statistics.median(seconds), 2) if seconds else None
    return figures


def _change(before: Measured, after: Measured) -> float:
    return 100 * (after.step_seconds / before.step_seconds - 1)


def _interval(values: list[float]) -> tuple[float | None, float | None]:
    """95 % of the median, by drawing the values anew (Efron's bootstrap)."""
    if len(values) < 3:
        return None, None
    chance = random.Random(7)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return round(medians[int(0.025 * _RESAMPLES)], 3), round(medians[int(0.975 * _RESAMPLES)], 3)


def _watch_by_turns(
    started: RunDirectory, home: Path, window_seconds: float, deadline: float
) -> tuple[list[Window], dict[str, Any]]:
    """Windows until `deadline`, in the order off on, on off, off on, …; and what the watcher did. Meanwhile this process sleeps."""
    arguments = [str(started.path), str(home / "every_second.jsonl"), str(_PAGES)]
    watcher = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.training.watcher", *arguments], cwd=_ROOT, stdout=subprocess.PIPE, text=True
    )
    supervisor = int(read_json(started.state_file)["supervisor"]["pid"])
    watching = (supervisor, watcher.pid)
    output = watcher.stdout
    windows: list[Window] = []
    try:
        if output is None or output.readline() != "ready\n":
            raise RuntimeError("the watcher did not start")
        while time.monotonic() + 2 * window_seconds < deadline:
            is_first_watched = len(windows) % 4 == 2
            for is_watched in (is_first_watched, not is_first_watched):
                processes.send(watching, signal.SIGCONT if is_watched else signal.SIGSTOP)
                begins_at = time.time() + _SETTLE_SECONDS
                time.sleep(window_seconds)
                windows.append(Window(is_watched, begins_at, time.time()))
    finally:
        processes.send(watching, signal.SIGCONT)
        watcher.terminate()
        said, _ = watcher.communicate(timeout=30)
    return windows, json.loads(said.splitlines()[-1])


def _end(started: RunDirectory, setting: Setting) -> None:
    if read_status(started).phase.is_active:
        request_stop(started, "cancel")
    ranks.wait(started, setting, seconds=_END_SECONDS)


@contextmanager
def _home() -> Iterator[Path]:
    """A folder for the run; its devices are kept there too: the bench holds the card."""
    before = os.environ.get(FOLDER_VARIABLE)
    home = Path(tempfile.mkdtemp(prefix="danlu_watching_"))
    os.environ[FOLDER_VARIABLE] = str(home / "devices")
    try:
        yield home
    finally:
        os.environ.pop(FOLDER_VARIABLE, None)
        if before is not None:
            os.environ[FOLDER_VARIABLE] = before
        shutil.rmtree(home, ignore_errors=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=__doc__)
    parser.add_argument("--shape", default="1.8b", help="1.8b, 0.6b or tiny")
    parser.add_argument("--speed", default="auto", help="off: stock XTuner; auto: the speed layer")
    parser.add_argument("--seconds", type=float, default=145.0, help="about how long it may take in all")
    parser.add_argument("--window-seconds", type=float, default=_WINDOW_SECONDS)
    arguments = parser.parse_args(argv)
    result = measure(arguments.shape, arguments.speed, arguments.seconds, arguments.window_seconds)
    print(json.dumps({"name": "watching", "figures": result.figures, "missed": result.missed}), flush=True)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
