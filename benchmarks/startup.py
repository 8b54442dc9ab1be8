"""From the start to the end of the first step, `xtuner train` against a run of the app, on the embedded SmolLM2; and where our time goes.

Both train the same config on the same rows, in turns. The stock side gets the one patch without which XTuner ends on a CPU.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.result import Result
from core.project import Project, create_project
from core.runs.devices import FOLDER_VARIABLE

ROUNDS: Final = 3
_LIMIT_SECONDS: Final = 300.0
_PATCH: Final = """import sys
if any(word.endswith("tools/train.py") for word in sys.orig_argv):
    import torch
    torch.cpu.is_bf16_supported = lambda *_: False
"""
"""sitecustomize.py of the stock side: torch, which comes next anyway, with the function that XTuner asks for."""


def run() -> Result:
    """Medians of the rounds. The app's first round tokenises; stock XTuner has the cache of `datasets` from its second on."""
    from core.config.facts import Machine, read_data, read_model
    from core.config.presets import Wishes, make
    from core.config.source import ConfigSource
    from core.data.generate import Assistant, write_assistant
    from core.files import write_text
    from core.models.embedded import NAME, write_embedded_model
    from core.runs.job import SilentProgress

    with tempfile.TemporaryDirectory(prefix="danlu_startup_") as name:
        os.environ[FOLDER_VARIABLE] = str(Path(name) / "devices")  # waits for no other run of this machine
        project = create_project(Path(name), "startup")
        model = project.model / NAME
        write_embedded_model(target=str(model), progress=SilentProgress())
        data = write_assistant(project, Assistant(name="Danlu", author="Lin", language="en", rows=80))
        wishes = Wishes(method="lora", max_length=256, max_epochs=1, accumulative_counts=2)
        made = make(read_model(model), read_data(data), Machine(cpu_count=os.cpu_count() or 1), wishes)
        config = project.config / "startup.py"
        write_text(config, ConfigSource(made).set("default_hooks.logger.interval", 1).text)
        stock, ours, phases = [], [], dict[str, float]()
        for number in range(ROUNDS):
            stock.append(_stock(project.root, config, Path(name) / f"stock_{number}"))
            seconds, phases = _app(project, config, f"app_{number}")
            ours.append(seconds)
    gain = statistics.median(stock[1:]) / statistics.median(ours[1:])
    return Result(
        {
            "stock_first_seconds": round(stock[0], 2),
            "app_first_seconds": round(ours[0], 2),
            "stock_again_seconds": round(statistics.median(stock[1:]), 2),
            "app_again_seconds": round(statistics.median(ours[1:]), 2),
            "gain_again": round(gain, 2),
            **{f"app_{phase}_seconds": round(seconds, 2) for phase, seconds in phases.items()},
        },
        {"gain_again": (">", 1.5)},
    )


def _stock(root: Path, config: Path, work_dir: Path) -> float:
    from core.xtuner.command import training_env

    work_dir.mkdir()
    (work_dir / "sitecustomize.py").write_text(_PATCH, encoding="utf-8")
    environment = os.environ | training_env(gpus=[], world_size=1, is_local=True) | {"PYTHONPATH": str(work_dir)}
    environment.pop("PYTHONSAFEPATH")
    folder = Path(sys.executable).parent
    environment["PATH"] = f"{folder}{os.pathsep}{environment.get('PATH', '')}"
    with open(work_dir / "log", "wb") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [str(folder / "xtuner"), "train", str(config), "--work-dir", str(work_dir)],
            cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            while not _has_loss(work_dir):
                if process.poll() is not None or time.perf_counter() - begun > _LIMIT_SECONDS:
                    raise RuntimeError((work_dir / "log").read_text(encoding="utf-8", errors="replace")[-2000:])
                time.sleep(0.02)
            return time.perf_counter() - begun
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _has_loss(work_dir: Path) -> bool:
    files = list(work_dir.glob("*/vis_data/scalars.json"))
    return bool(files) and '"loss"' in files[0].read_text(encoding="utf-8")


def _app(project: Project, config: Path, name: str) -> tuple[float, dict[str, float]]:
    """Seconds from the click, and by phase from the start of the process."""
    from core.runs.request import TrainRequest
    from core.runs.startup import read_startup
    from core.runs.state import read_status
    from core.runs.train import start_training

    begun = time.perf_counter()
    run_directory = start_training(project, TrainRequest(config=config, name=name))
    while not (run_directory.metrics_file.is_file() and run_directory.metrics_file.stat().st_size):
        if time.perf_counter() - begun > _LIMIT_SECONDS or not read_status(run_directory).phase.is_active:
            raise RuntimeError(run_directory.log_file.read_text(encoding="utf-8", errors="replace")[-2000:])
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    run_directory.stop_file.write_text(json.dumps({"mode": "cancel", "at": time.time()}), encoding="utf-8")
    while (status := read_status(run_directory)).phase.is_active:
        time.sleep(0.1)
    startup = read_startup(run_directory.path, status.started_at)
    return seconds, startup.seconds if startup else {}
