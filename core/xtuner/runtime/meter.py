"""Measures the pace of a training run for a few seconds and ends it. Runs in the trainer's process; `trial` starts it."""

import time
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.hooks import Hook

from core.files import write_json
from core.xtuner.runtime.hooks import count_tokens
from core.xtuner.runtime.speed.parts import FAST_PASS, GROUPED, read_reports

_WARM_STEPS: Final = 2


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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
