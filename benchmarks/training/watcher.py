"""Watches one run as an open page does, and samples the machine: `python -m benchmarks.training.watcher RUN_DIR SAMPLES_FILE PAGES`.

Once a second each page does what a refresh of all its views does: the files are read through core, the points of every chart are
chosen and packed as they go to a browser, and Streamlit, which a machine that trains need not have, is left out. A second sampler
beside the supervisor's asks NVML every second. On SIGTERM it prints one JSON line: what it did, and what that took.
"""

import json
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.config.memory.comparison import estimate_of, measured_bytes
from core.runs.curves import downsample, ratio, smooth
from core.runs.directory import RunDirectory
from core.runs.failure import explain_failure
from core.runs.logs import log_file, read_tail, select
from core.runs.machine import GPU_FIELDS, MACHINE_FIELDS, MachineReader, energy_kwh
from core.runs.metrics import Metrics, MetricsReader
from core.runs.progress import measure
from core.runs.samples import read_answers
from core.runs.sampling import Sampler
from core.runs.saving import read_saving
from core.runs.startup import read_startup
from core.runs.state import read_status
from core.runs.validation import best_of, is_validating, read_validation
from core.runs.watch import read_alerts
from core.xtuner.runtime.speed.parts import read_reports

_EVERY_SECONDS: Final = 1.0
_LOSS_POINTS: Final = 1600
_SMALL_POINTS: Final = 400
_HARDWARE_POINTS: Final = 900
_SHOWN_LINES: Final = 500
_SMALL_CHARTS: Final = ("lr", "grad_norm", "step_seconds", "data_seconds", "memory_bytes")


class Page:
    """One browser's view of one run: readers that go on where they were, as the server keeps them."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._metrics, self._machine = MetricsReader(run.metrics_file), MachineReader(run.gpu_file)
        self._estimate = estimate_of(run)

    def refresh(self) -> int:
        """The head and every view, read and packed. Bytes that a browser would get."""
        status, metrics = read_status(self._run), self._metrics.refresh()
        series = self._machine.refresh()
        tail = select(read_tail(log_file(self._run)).lines)[-_SHOWN_LINES:]
        packed = [
            self._head(metrics, status.started_at),
            {"failure": str(explain_failure(self._run, status)), "log": tail},
            [] if not len(metrics) else self._curves(metrics),
            [] if not len(series) else self._hardware(series, metrics),
        ]
        return len(json.dumps(packed))

    def _head(self, metrics: Metrics, started_at: float | None) -> list[str]:
        memory = None if self._estimate is None else measured_bytes(self._estimate, metrics)
        said = (
            measure(metrics, started_at), best_of(self._run), is_validating(self._run, time.time()), read_alerts(self._run),
            memory, read_reports(self._run.path), read_startup(self._run.path, started_at), read_saving(self._run.path),
        )  # fmt: skip
        return [str(each) for each in said]

    def _curves(self, metrics: Metrics) -> list[Any]:
        steps, tokens, seconds = metrics["iteration"], metrics["tokens"], metrics["step_seconds"]
        charts = [
            _points(steps, smooth(metrics["loss"], 0.9), _LOSS_POINTS),
            _points(steps, metrics["loss"], _LOSS_POINTS),
        ]
        charts += [_points(steps, metrics[name], _SMALL_POINTS) for name in _SMALL_CHARTS if metrics.has(name)]
        places, speed = ratio(tokens, seconds, _SMALL_POINTS)
        charts += 2 * [_points(steps[places], speed, _SMALL_POINTS)]  # and MFU, which is a multiple of it
        answers = [answer.answer[:400] for answer in read_answers(self._run)]
        return [*charts, read_validation(self._run), answers, [path.name for path in self._run.path.glob("iter_*")]]

    def _hardware(self, series: Any, metrics: Metrics) -> list[Any]:
        lines = [(series.at, series.machine[name]) for name in MACHINE_FIELDS]
        lines += [(columns["at"], columns[name]) for columns in series.gpus.values() for name in GPU_FIELDS]
        if len(metrics) > 1:
            reached = np.maximum.accumulate(metrics["at"])
            lines = [(np.interp(at, reached, metrics["iteration"], left=np.nan), values) for at, values in lines]
        energy = [energy_kwh(series, gpu) for gpu in series.gpus]
        return [energy, *(_points(x, values, _HARDWARE_POINTS) for x, values in lines if np.isfinite(values).any())]


def _points(x: Any, values: Any, count: int) -> list[list[float]]:
    chosen = downsample(values, count)
    return np.round(np.column_stack([x[chosen], values[chosen]]), 6).tolist()  # type: ignore[no-any-return]


def main(argv: list[str]) -> int:
    run, samples, pages = RunDirectory(Path(argv[0])), Path(argv[1]), int(argv[2])
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    views = [Page(run) for _ in range(pages)]
    for view in views:
        view.refresh()  # what it imports and reads for the first time is no refresh
    sampler = Sampler(samples, run.path, every=_EVERY_SECONDS)
    sampler.start()
    seconds: list[float] = []
    sent = 0
    print("ready", flush=True)
    due = time.monotonic()
    while not ended.wait(max(0.0, due - time.monotonic())):
        due = max(due + _EVERY_SECONDS, time.monotonic())  # after it was held up: from now on, and nothing made up for
        for view in views:
            begun = time.perf_counter()
            sent = view.refresh()
            seconds.append(time.perf_counter() - begun)
    sampler.stop()
    done = {
        "refreshes": len(seconds),
        "refresh_milliseconds": round(1000 * statistics.median(seconds), 1) if seconds else None,
        "kilobytes_to_browser": round(sent / 1000, 1),
        "samples": samples.read_bytes().count(b"\n") if samples.exists() else 0,
        "cpu_seconds": round(time.process_time(), 2),
    }
    print(json.dumps(done), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
