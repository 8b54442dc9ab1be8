"""Two configs compared by what training reads of them: layout, comments and the names of variables do not count."""

from dataclasses import dataclass
from typing import Any, Final

from core.config.source import ConfigSource
from core.config.values import Code, format_value

_READ: Final = (
    "model",
    "tokenizer",
    "train_dataloader",
    "val_dataloader",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "val_cfg",
    "validation",
    "custom_hooks",
    "default_hooks",
    "visualizer",
    "randomness",
    "log_processor",
    "load_from",
    "resume",
    "env_cfg",
)
"""What XTuner's trainer takes from a config, and the app's hook from `validation`; everything else is there to be put into these."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs."""

    path: str
    """As in the config: `model.lora.r`, `custom_hooks[EvaluateChatHook].every_n_iters`."""
    left: str | None
    """As source text; None where this config does not have it."""
    right: str | None


def compare(left: ConfigSource, right: ConfigSource) -> list[Difference]:
    """Every value that training would read differently, in the order of the trainer's parts."""
    ours, theirs = flatten(left), flatten(right)
    paths = list(dict.fromkeys([*ours, *theirs]))
    found = [Difference(path, ours.get(path), theirs.get(path)) for path in paths if ours.get(path) != theirs.get(path)]
    order = {name: number for number, name in enumerate(_READ)}
    return sorted(found, key=lambda one: order[one.path.partition(".")[0].partition("[")[0]])


def flatten(source: ConfigSource) -> dict[str, str]:
    """Path → value as source text, of everything that training reads."""
    found: dict[str, str] = {}
    for name in _READ:
        if source.has(name):
            _add(found, name, source.get(name))
    return found


def _add(found: dict[str, str], path: str, value: Any) -> None:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _add(found, f"{path}.{key}", item)
    elif isinstance(value, list | tuple) and value and all(isinstance(item, dict) and item for item in value):
        for number, item in enumerate(value):
            _add(found, f"{path}[{_kind(item, number)}]", item)
    else:
        found[path] = _text(value)


def _kind(item: dict[str, Any], number: int) -> str:
    """The name of its type, by which a hook is known, else its place."""
    kind = item.get("type")
    return str(kind).rpartition(".")[2].strip("'\"") if kind is not None else str(number)


def _text(value: Any) -> str:
    if isinstance(value, Code):
        return str(value)
    try:
        return format_value(value)
    except TypeError:
        return repr(value)
