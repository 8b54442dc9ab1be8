"""Measures one setting for a few seconds: `python -m core.xtuner.runtime.trial FOLDER`, FOLDER holding trial.json.

Trains as a run would, with XTuner's runner on the config's own model and data, but saves nothing. Writes result.json. Which
settings are worth measuring is not known here.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.hooks import Hook

from core.files import read_json, write_json
from core.xtuner.runtime import compat, entry, failures
from core.xtuner.runtime.hooks import count_tokens
from core.xtuner.runtime.speed import install
from core.xtuner.runtime.speed.parts import FAST_PASS, GROUPED, Wish, read_reports

_ROWS: Final = 3000
"""Of each data set: enough to fill the steps, quick to tokenise."""
_WARM_STEPS: Final = 2
_ENDLESS: Final = 10**6


class MeterHook(Hook):  # type: ignore[misc]
    """Counts tokens between the ends of windows (fast pass) or micro-steps, after a warm-up, for about `seconds`."""

    priority = "LOWEST"

    def __init__(self, folder: str, seconds: float, accumulation: int) -> None:
        self._folder = Path(folder)
        self._seconds = seconds
        self._accumulation = accumulation
        self._unit: int | None = None
        self._done = 0
        self._tokens = 0
        self._begun: float | None = None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        del batch_idx, outputs
        if self._unit is None:
            is_fast = any(report.name == FAST_PASS and report.applied for report in read_reports(self._folder))
            self._unit = self._accumulation if is_fast else 1
        self._done += 1
        self._tokens += count_tokens(data_batch)
        if self._done % self._unit:
            return
        now = _now()
        if self._begun is None:
            if self._done >= _WARM_STEPS * self._unit:
                self._begun, self._tokens = now, 0
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
        elif now - self._begun >= self._seconds:
            self._write(now - self._begun)
            runner.train_loop.stop_training = True

    def _write(self, elapsed_seconds: float) -> None:
        on_gpu = torch.cuda.is_available()
        reports = read_reports(self._folder)
        together = next((report.note.params.get("tokens") for report in reports if report.name == GROUPED), None)
        result = {
            "tokens_per_second": self._tokens / elapsed_seconds,
            "memory_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
            "parts": [report.name for report in reports if report.applied],
            "tokens_per_pass": together,
            "measured_seconds": round(elapsed_seconds, 2),
        }
        write_json(self._folder / "result.json", result)


def measure(folder: Path, asked: dict[str, Any]) -> None:
    """Train as trial.json in `folder` says until the meter has seen enough."""
    from mmengine.config import Config
    from mmengine.runner import Runner
    from xtuner.tools.train import register_function

    config = Config.fromfile(asked["config"])
    facts = compat.Facts(
        is_cpu=not torch.cuda.is_available(), model_type=asked.get("model_type", ""), rows=asked.get("rows")
    )
    shorten(config, asked["setting"], folder, asked["seconds"])
    compat.apply(config, facts)
    if asked["setting"]["speed"] != "off":
        install.prepare(config, Wish.from_json(asked["setting"]["speed"]))
    register_function(config._cfg_dict)
    entry.join_group({})
    try:
        Runner.from_cfg(config).train()
    finally:
        entry.leave_group()


def shorten(config: Any, setting: dict[str, Any], folder: Path, seconds: float) -> None:
    """Make the loaded config train with `setting`, without end, saving nothing and answering nothing."""
    config.train_dataloader["batch_size"] = setting["batch_size"]
    config.optim_wrapper["accumulative_counts"] = setting["accumulation"]
    config.model["use_activation_checkpointing"] = setting["checkpointing"]
    for dataset in install.packable_sets(config.train_dataloader.dataset):
        dataset["max_dataset_length"] = min(dataset.get("max_dataset_length") or _ROWS, _ROWS)
    config.train_cfg.pop("max_epochs", None)
    config.train_cfg["max_iters"] = _ENDLESS
    config.param_scheduler = []
    config.visualizer = None
    config.load_from, config.resume = None, False
    config.default_hooks = {"checkpoint": None, "logger": None}
    meter = {"type": "core.xtuner.runtime.trial.MeterHook", "folder": str(folder), "seconds": seconds}
    config.custom_hooks = [{**meter, "accumulation": setting["accumulation"]}]
    config.work_dir, config.launcher = str(folder), "none"
    config.experiment_name = folder.name


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str]) -> int:
    folder = Path(argv[0])
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    try:
        measure(folder, read_json(folder / "trial.json"))
    except Exception as error:
        explained = failures.explain(error)
        if explained is None:
            raise
        write_json(folder / "error.json", explained.to_json())
        return entry.EXIT_EXPLAINED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
