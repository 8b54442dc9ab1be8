"""Ends the clock of the start-up with the first step and writes what it says."""

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from core.runs.startup import clock


class StartHook(Hook):  # type: ignore[misc]
    """Before every other hook at the start (sample answers are generated there), and once after the first step."""

    priority = 0

    def __init__(self, run: str) -> None:
        self._run = Path(run)
        self._is_over = False

    def before_train(self, runner: Any) -> None:
        del runner
        clock.until("setup")

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        del runner, batch_idx, data_batch
        if not self._is_over:
            clock.until("answers")

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        del runner, batch_idx, data_batch, outputs
        if self._is_over:
            return
        self._is_over = True
        clock.until("first_step")
        if is_main_process():
            clock.write(self._run)
