"""A stop at a fixed place of a real training: a tiny model's dozen steps take a tenth of a second, and no poll is sure to hit them."""

import json
import time
from pathlib import Path
from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook


class AskToStop(Hook):  # type: ignore[misc]
    """Writes stop.request, as a person's click would, when `after` iterations are done. A resumed training is past them."""

    # Before the run's own StopHook looks for the file.
    priority = "HIGHEST"

    def __init__(self, after: int) -> None:
        self._after = after

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        del batch_idx, data_batch
        if runner.iter == self._after and get_rank() == 0:
            request = Path(runner.work_dir) / "stop.request"
            request.write_text(json.dumps({"mode": "save", "at": time.time()}), encoding="utf-8")
