"""Gives the optimizer's states of a resumed run their numbers. Runs in the trainer's process.

A plain checkpoint written from a DeepSpeed one knows its trained parameters by name (`core.checkpoints.plain_writer`). The optimizer
counts the frozen ones too, in an order that only the model knows.
"""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from core.checkpoints.plain_layout import numbered


class NumberHook(Hook):  # type: ignore[misc]
    """Between reading a checkpoint and giving it to the optimizer."""

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if "optimizer" in checkpoint:
            checkpoint["optimizer"] = numbered(checkpoint["optimizer"], [name for name, _ in model.named_parameters()])
