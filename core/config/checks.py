"""All checks of a config before it costs an hour. Each is a function from source and context to findings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from core.config.checks_of_data import DATA_CHECKS
from core.config.checks_of_deepspeed import DEEPSPEED_CHECKS
from core.config.checks_of_start import START_CHECKS
from core.config.checks_of_text import TEXT_CHECKS
from core.config.checks_of_training import TRAINING_CHECKS
from core.config.checks_of_validation import VALIDATION_CHECKS
from core.config.deepspeed import Setting
from core.config.edits import data_files
from core.config.facts import DataFacts, Machine, ModelFacts, read_data, read_model
from core.config.findings import Context, Finding, Severity
from core.config.source import ConfigSource
from core.errors import InputError

_MAX_FIXES: Final = 40
_ORDER: Final = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.ADVICE: 2}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where a config will train: the machine, the start, and what the project has to offer in place of what is missing."""

    machine: Machine = field(default_factory=Machine)
    world_size: int = 1
    deepspeed: str | None = None
    setting: Setting | None = None
    models: Sequence[Path] = ()
    data_files: Sequence[Path] = ()
    root: Path = Path()
    """Where the trainer works, and relative paths begin: the project's folder."""


def gather(source: ConfigSource, around: Surroundings) -> Context:
    """Facts of the model and the data that the config itself names. What cannot be read is left out: the path checks say why."""
    named = next(
        (source.get(name) for name in ("pretrained_model_name_or_path", "llm_name_or_path") if source.has(name)), None
    )
    files = data_files(source)
    return Context(
        model=_model([around.root / named] if isinstance(named, str) else []),
        data=_data([around.root / files[0]] if len(files) == 1 else []),
        machine=around.machine,
        world_size=around.world_size,
        deepspeed=around.deepspeed,
        setting=around.setting,
        own_model=_model(around.models),
        own_data=_data(around.data_files),
        root=around.root,
    )


def _model(folders: Sequence[Path]) -> ModelFacts | None:
    """Facts of the first folder, if it can be read."""
    try:
        return read_model(folders[0]) if folders else None
    except InputError:
        return None


def _data(files: Sequence[Path]) -> DataFacts | None:
    try:
        return read_data(files[0]) if files else None
    except InputError:
        return None


def check(source: ConfigSource, context: Context) -> list[Finding]:
    """Everything that is wrong or odd, worst first."""
    every = (*DATA_CHECKS, *TEXT_CHECKS, *TRAINING_CHECKS, *VALIDATION_CHECKS, *START_CHECKS, *DEEPSPEED_CHECKS)
    findings = [finding for one in every for finding in one(source, context)]
    return sorted(findings, key=lambda finding: (_ORDER[finding.severity], finding.line or 0))


def apply_fix(source: ConfigSource, finding: Finding) -> ConfigSource:
    """The config with the fix of a finding; itself if the finding has none."""
    return source if finding.fix is None else finding.fix(source)


def fix_all(source: ConfigSource, around: Surroundings) -> ConfigSource:
    """The config with every finding fixed that has a fix, checked anew after each: one fix may settle or change another."""
    for _ in range(_MAX_FIXES):
        findings = check(source, gather(source, around))
        fixable = next((finding for finding in findings if finding.fix is not None), None)
        if fixable is None:
            break
        fixed = apply_fix(source, fixable)
        if fixed.text == source.text:
            break
        source = fixed
    return source
