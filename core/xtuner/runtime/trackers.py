"""Tells the services that a config reports to what only the run knows: its name, and where MLflow is. Runs in the trainer's process."""

import os
from typing import Any, Final

from mmengine.visualization import MLflowVisBackend

from core.xtuner.runtime.compat import type_name

_ADDRESS: Final = "MLFLOW_TRACKING_URI"
_NAMES: Final = {"WandbVisBackend": "name", "SwanlabVisBackend": "experiment_name"}
"""Backend → what its `init_kwargs` call the name of a run."""


class MLflowBackend(MLflowVisBackend):  # type: ignore[misc]
    """mmengine's writes to a file unless its config has the address. The address may hold a password, and a config is kept in
    every checkpoint: this one takes it from the environment.
    """

    _tracking_uri: str | None

    def _init_env(self) -> Any:
        self._tracking_uri = os.environ.get(_ADDRESS, self._tracking_uri)
        return super()._init_env()


def name_run(config: Any, run_id: str) -> None:
    """Give the run's name to each backend of the loaded config that has none."""
    for backend in (config.get("visualizer") or {}).get("vis_backends") or []:
        if not isinstance(backend, dict):
            continue
        name = type_name(backend["type"])
        if name in _NAMES:
            backend["init_kwargs"] = {_NAMES[name]: run_id, **(backend.get("init_kwargs") or {})}
        elif name == "MLflowVisBackend":
            backend["run_name"] = backend.get("run_name") or run_id
            if os.environ.get(_ADDRESS) and not backend.get("tracking_uri"):
                backend["type"] = (
                    f"{__name__}.{MLflowBackend.__name__}"  # a class could not be written into a checkpoint
                )
