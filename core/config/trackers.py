"""Where else a run's values go: the `visualizer` of a config, for services that mmengine or their own package can report to.

Knows the backends and their packages; reads no secret. Keys and addresses stay in the environment of the server, from where the
trainer has them: a config, run.json, a checkpoint and a bundle hold none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from core.config.source import ConfigSource
from core.config.values import Code

PROJECT: Final = "danlu"
_LOCAL: Final = "LocalVisBackend"
"""XTuner's own scalars.json, which a visualizer without backends named would write too."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """One service. `name` is its own; it needs no translation."""

    key: str
    name: str
    package: str
    backend: str
    """`type` of the backend: in mmengine's registry, or a path to import."""
    secrets: tuple[str, ...] = ()
    """Variables of the environment, one of which it takes its key or address from."""
    offline: str | None = None
    """`mode` of `init_kwargs` that keeps everything on this machine; None where it has none, or needs none."""


TRACKERS: Final = (
    Tracker("tensorboard", "TensorBoard", "tensorboard", "TensorboardVisBackend"),
    Tracker("wandb", "Weights & Biases", "wandb", "WandbVisBackend", ("WANDB_API_KEY",), "offline"),
    Tracker("mlflow", "MLflow", "mlflow", "MLflowVisBackend", ("MLFLOW_TRACKING_URI",)),
    Tracker(
        "swanlab",
        "SwanLab",
        "swanlab",
        "swanlab.integration.mmengine.SwanlabVisBackend",
        ("SWANLAB_API_KEY",),
        "offline",
    ),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a config says."""

    trackers: tuple[Tracker, ...]
    is_offline: bool = False
    is_own: bool = False
    """The config has a visualizer that was not written here: it is left as it is."""


def read_trackers(source: ConfigSource) -> Choice:
    value = source.get("visualizer", None)
    if value is None:
        return Choice(())
    backends = value.get("vis_backends") if isinstance(value, Mapping) else None
    if not isinstance(backends, list) or not all(isinstance(one, Mapping) for one in backends):
        return Choice((), is_own=True)
    types = [str(one.get("type")).rsplit(".", maxsplit=1)[-1] for one in backends]
    known = {tracker.backend.rsplit(".", maxsplit=1)[-1]: tracker for tracker in TRACKERS}
    if set(types) - set(known) - {_LOCAL}:
        return Choice((), is_own=True)
    modes = [dict(one.get("init_kwargs") or {}).get("mode") for one in backends]
    return Choice(tuple(known[name] for name in types if name in known), is_offline="offline" in modes)


def set_trackers(source: ConfigSource, keys: Iterable[str], *, is_offline: bool) -> ConfigSource:
    """The config that reports to these services beside XTuner's own file. Raises InputError `config.no_such_place`."""
    chosen = [tracker for tracker in TRACKERS if tracker.key in set(keys)]
    if not chosen:
        return source.set("visualizer", None)
    lines = [f'dict(type="{_LOCAL}")', *(_backend(tracker, is_offline=is_offline) for tracker in chosen)]
    listed = "".join(f"        {line},\n" for line in lines)
    return source.set("visualizer", Code(f'dict(\n    type="Visualizer",\n    vis_backends=[\n{listed}    ],\n)'))


def _backend(tracker: Tracker, *, is_offline: bool) -> str:
    if tracker.key == "tensorboard":
        return f'dict(type="{tracker.backend}")'
    if tracker.key == "mlflow":
        return f'dict(type="{tracker.backend}", exp_name="{PROJECT}")'
    mode = f', mode="{tracker.offline}"' if is_offline and tracker.offline else ""
    return f'dict(type="{tracker.backend}", init_kwargs=dict(project="{PROJECT}"{mode}))'
