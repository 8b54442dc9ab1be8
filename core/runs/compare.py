"""How two runs differ: settings by meaning, not by lines of text; data, model, machine and versions. Draws nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final

from core.config.fields import fill, shown
from core.config.json_places import read_object
from core.config.source import ConfigSource
from core.errors import DanluError
from core.runs.directory import RunDirectory, RunSpec

_DETAILS: Final = ("method", "deepspeed", "seed", "world_size", "speed", "resume", "total_iterations")
_HASH_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same. A side that does not say is None."""

    group: str
    """`config`, `data`, `model`, `start` or `versions`."""
    name: str
    """Key of a form field (`config.fields.<name>.label`), of a fact (`runs.facts.<name>`), or a name that needs no words."""
    values: tuple[str | None, ...]
    """One for each run."""


def differences(runs: list[RunDirectory]) -> list[Difference]:
    """Everything in which these runs differ, in the order of the form. A run that cannot be read differs in all it lacks."""
    facts = [dict(_facts(run)) for run in runs]
    names = list(dict.fromkeys(name for each in facts for name in each))
    rows = [Difference(group, name, tuple(each.get((group, name)) for each in facts)) for group, name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def read_source(run: RunDirectory) -> str | None:
    """The run's own copy of the config; None if it has none."""
    files = sorted(run.source.glob("*.py"))
    try:
        return files[0].read_text(encoding="utf-8") if files else None
    except (OSError, UnicodeDecodeError):
        return None


def _facts(run: RunDirectory) -> Iterator[tuple[tuple[str, str], str | None]]:
    yield from _of_config(run)
    try:
        spec = run.spec()
    except DanluError:
        return
    yield from _of_spec(spec)


def _of_config(run: RunDirectory) -> Iterator[tuple[tuple[str, str], str | None]]:
    text = read_source(run)
    if text is None:
        return
    try:
        filled = fill(ConfigSource(text))
    except DanluError:
        return
    for each in filled:
        yield ("config", each.field.key), _said(shown(each))


def _of_spec(spec: RunSpec) -> Iterator[tuple[tuple[str, str], str | None]]:
    details = spec.details
    for number, data in enumerate(details.get("data") or [], 1):
        name = PurePath(str(data.get("path"))).name
        yield (
            ("data", "data" if number == 1 else f"data {number}"),
            f"{name} · {data.get('rows')} · {str(data.get('sha256'))[:_HASH_DIGITS]}",
        )
    model: Mapping[str, Any] = details.get("base_model") or {}
    if model:
        name = PurePath(str(model.get("path"))).name
        yield ("model", "base_model"), f"{name} · {str(model.get('fingerprint'))[:_HASH_DIGITS]}"
    for name in _DETAILS:
        if name in details:
            yield ("start", name), _said(details[name])
    for path, value in _of_deepspeed(details.get("deepspeed_config")):
        yield ("start", f"DeepSpeed {path}"), value
    yield ("start", "gpus"), _said(len(spec.gpus))
    for name, version in (details.get("versions") or {}).items():
        yield ("versions", name), str(version)


def _of_deepspeed(kept: Mapping[str, Any] | None) -> Iterator[tuple[str, str | None]]:
    """Every value of a run's DeepSpeed JSON by its path; nothing of one that is broken."""
    if not kept:
        return
    try:
        json = read_object(str(kept["text"]))
    except (DanluError, KeyError):
        return
    for path in json.places:
        value: Any = json.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping):
            yield path, _said(value)


def _said(value: Any) -> str | None:
    return None if value is None else str(value)
