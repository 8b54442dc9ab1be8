"""The live page on the largest runs: a million steps, and a day of eight GPUs, opened and refreshed; what goes to the browser; and
what the supervisor takes while it watches a run that writes ten steps a second.
"""

import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.result import Result
from core.files import read_json
from core.runs.directory import RunDirectory, RunSpec

STEPS = 1_000_000
GPUS = 8
DAY_SECONDS = 24 * 3600
_REFRESHES = 10
_WATCHED_SECONDS = 30


def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, float | int | str | None] = {
            **_metrics(Path(folder)),
            **_machine(Path(folder)),
            **_page(Path(folder)),
            **_watching(Path(folder)),
        }
    return Result(
        figures,
        {
            "open_million_steps_seconds": ("<", 1.0),
            "refresh_million_steps_milliseconds": ("<", 50.0),
            "open_day_of_8_gpus_seconds": ("<", 1.0),
            "refresh_day_of_8_gpus_milliseconds": ("<", 50.0),
            "curves_to_browser_kilobytes": ("<", 200.0),
            "hardware_to_browser_kilobytes": ("<", 200.0),
            "supervisor_cpu_seconds_per_minute": ("<", 0.6),
            "supervisor_peak_megabytes": ("<", 40.0),
        },
    )


def write_steps(file: Path, first: int, count: int, total: int = STEPS) -> None:
    """Lines as the trainer's hook writes them."""
    generator = random.Random(first)
    with open(file, "a", encoding="utf-8") as stream:
        for iteration in range(first, first + count):
            line = {
                "iteration": iteration,
                "epoch": round(iteration / 50_000, 4),
                "total_iterations": total,
                "loss": (1 + 2 * math.exp(-iteration / 50_000)) * generator.lognormvariate(0, 0.1),
                "lr": 2e-4 * (1 - iteration / (total + 1)),
                "grad_norm": generator.lognormvariate(-1, 0.3) if iteration % 4 == 0 else None,
                "tokens": 2048,
                "step_seconds": round(generator.uniform(0.4, 0.6), 6),
                "data_seconds": 0.001234,
                "memory_bytes": 12_345_678_901,
                "at": round(1.7e9 + iteration * 0.5, 3),
            }
            stream.write(json.dumps(line) + "\n")


def write_day(file: Path) -> None:
    """A day of eight GPUs through the sampler's own writer, which thins the file when it grows long."""
    from core.runs.sampling import SAMPLE_SECONDS, Sampler

    sampler = Sampler(file, file.parent)
    generator = random.Random(0)
    at = 1.7e9
    while at < 1.7e9 + DAY_SECONDS:
        at += sampler.every_seconds if sampler.every_seconds > SAMPLE_SECONDS else SAMPLE_SECONDS
        sampler.append({"at": at, "gpus": [_gpu(generator, index) for index in range(GPUS)], **_rest(generator)})


def _gpu(generator: random.Random, index: int) -> dict[str, Any]:
    return {
        "index": index,
        "uuid": f"GPU-{index:08d}-0000-0000-0000-000000000000",
        "utilization_percent": generator.randint(70, 100),
        "memory_used_bytes": generator.randint(60, 79) * 2**30,
        "memory_total_bytes": 80 * 2**30,
        "power_watts": round(generator.uniform(300, 690), 3),
        "temperature_celsius": generator.randint(50, 80),
        "sm_clock_mhz": generator.randint(1200, 1980),
        "throttle_reasons": 4,
        "ecc_uncorrected": 0,
    }


def _rest(generator: random.Random) -> dict[str, Any]:
    from core.runs.machine import MACHINE_FIELDS

    return {name: round(generator.uniform(1, 1e6), 1) for name in MACHINE_FIELDS}


def _metrics(folder: Path) -> dict[str, float]:
    from core.runs.curves import downsample, smooth
    from core.runs.metrics import MetricsReader
    from core.runs.progress import measure

    file = folder / "metrics.jsonl"
    write_steps(file, 1, STEPS)
    reader = MetricsReader(file)
    cpu_before = time.process_time()
    opened, metrics = _timed(reader.refresh)
    cpu_seconds = time.process_time() - cpu_before
    if len(metrics) != STEPS:
        raise RuntimeError(f"{len(metrics)} of {STEPS} steps were read")
    refreshes = []
    for number in range(_REFRESHES):
        write_steps(file, STEPS + 1 + 4 * number, 4)

        def refresh() -> None:
            now = reader.refresh()
            measure(now, 1.7e9)
            smooth(now["loss"], 0.9)
            for name in ("loss", "loss", "lr", "grad_norm", "step_seconds", "data_seconds", "memory_bytes"):
                downsample(now[name], 800)

        refreshes.append(_timed(refresh)[0])
    return {
        "metrics_megabytes": round(file.stat().st_size / 1e6, 1),
        "open_million_steps_seconds": round(opened, 3),
        "open_million_steps_cpu_seconds": round(cpu_seconds, 3),
        "refresh_million_steps_milliseconds": round(statistics.median(refreshes) * 1000, 1),
    }


def _machine(folder: Path) -> dict[str, float]:
    from core.runs.machine import MachineReader
    from core.runs.sampling import Sampler

    file = folder / "gpu.jsonl"
    write_day(file)
    reader = MachineReader(file)
    opened, series = _timed(reader.refresh)
    refreshes = []
    sampler, generator = Sampler(file, folder, max_bytes=2**40), random.Random(1)
    for number in range(_REFRESHES):
        at = float(series.at[-1]) + 2 * (number + 1)
        sampler.append({"at": at, "gpus": [_gpu(generator, index) for index in range(GPUS)], **_rest(generator)})
        refreshes.append(_timed(reader.refresh)[0])
    return {
        "gpu_samples": len(series),
        "gpu_samples_megabytes": round(file.stat().st_size / 1e6, 1),
        "open_day_of_8_gpus_seconds": round(opened, 3),
        "refresh_day_of_8_gpus_milliseconds": round(statistics.median(refreshes) * 1000, 1),
    }


def _page(folder: Path) -> dict[str, float]:
    """Bytes of every chart that one refresh of a view sends, from the page's own code."""
    from core.runs.machine import MachineReader
    from core.runs.metrics import MetricsReader
    from pages.ui import charts
    from pages.ui.run_axes import ChartSettings
    from pages.ui.run_curves import run_curves
    from pages.ui.run_hardware import run_hardware

    run = RunDirectory(folder)
    metrics, series = MetricsReader(run.metrics_file).refresh(), MachineReader(run.gpu_file).refresh()
    curves, curves_seconds = _sent(charts, lambda: run_curves(run, metrics, ChartSettings(), 1.7e9))
    hardware, hardware_seconds = _sent(charts, lambda: run_hardware(series, metrics, ChartSettings(), 1.7e9))
    return {
        "curves_to_browser_kilobytes": round(curves / 1000, 1),
        "curves_drawn_milliseconds": round(curves_seconds * 1000, 1),
        "hardware_to_browser_kilobytes": round(hardware / 1000, 1),
        "hardware_drawn_milliseconds": round(hardware_seconds * 1000, 1),
    }


def _watching(folder: Path) -> dict[str, float]:
    """CPU time and memory of a supervisor with its sampler and its watch over the health, from /proc."""
    import psutil

    from core.runs.devices import FOLDER_VARIABLE
    from core.runs.launch import launch, now_utc
    from core.runs.state import read_status

    line = json.dumps(
        {"iteration": 1, "total_iterations": 9999, "loss": 2.0, "lr": 1e-4, "tokens": 64, "step_seconds": 0.1}
    )
    write = f"print({line!r}, file=open('metrics.jsonl', 'a'))"
    trainer = f"import time\nfor _ in range({10 * (_WATCHED_SECONDS + 5)}):\n {write}\n time.sleep(0.1)"
    run = RunDirectory(folder / "watched")
    spec = RunSpec(
        id="watched", kind="train", title="watched", argv=[sys.executable, "-S", "-c", trainer], cwd=str(run.path), env={},
        gpus=[], created_at=now_utc(), stop_seconds=1.0, details={},
    )  # fmt: skip
    run.path.mkdir()
    os.environ[FOLDER_VARIABLE] = str(folder / "devices")  # waits for no other run of this machine
    launch(folder, spec)
    supervisor = psutil.Process(read_json(run.state_file)["supervisor"]["pid"])
    time.sleep(2)  # its own imports are no watching
    before, begun = supervisor.cpu_times(), time.monotonic()
    time.sleep(_WATCHED_SECONDS)
    after, minutes = supervisor.cpu_times(), (time.monotonic() - begun) / 60
    status_file = Path(f"/proc/{supervisor.pid}/status")
    peak = next(line for line in status_file.read_text().splitlines() if line.startswith("VmHWM"))
    while read_status(run).phase.is_active:
        time.sleep(0.2)
    return {
        "supervisor_cpu_seconds_per_minute": round((sum(after[:2]) - sum(before[:2])) / minutes, 3),
        "supervisor_peak_megabytes": round(int(peak.split()[1]) / 1024, 1),
    }


def _sent(charts: Any, draw: Callable[[], None]) -> tuple[int, float]:
    """Bytes of the chart specifications that `draw` makes, and the seconds it takes."""
    import logging

    sizes: list[int] = []
    original = charts.st.echarts_chart
    logging.disable(logging.WARNING)  # Streamlit tells that there is no browser, at every call
    charts.st.echarts_chart = lambda spec, **_: sizes.append(len(json.dumps(spec, separators=(",", ":"))))
    try:
        seconds, _ = _timed(draw)
    finally:
        charts.st.echarts_chart = original
        logging.disable(logging.NOTSET)
    return sum(sizes), seconds


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value
