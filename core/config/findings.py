"""What a check says, and what all checks may know."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from core.config.deepspeed import Setting
from core.config.facts import DataFacts, Machine, ModelFacts
from core.config.source import ConfigSource
from core.messages import Message, message

Edit = Callable[[ConfigSource], ConfigSource]
_TOKENS_PER_BYTE = (0.15, 0.6)
"""Of JSON rows with Chinese or English text, markup included: few and many."""


class Severity(StrEnum):
    ERROR = "error"
    """Training would stop or learn the wrong thing."""
    WARNING = "warning"
    """It runs, but probably not as meant."""
    ADVICE = "advice"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a check found. `config.checks.<code>` says it, `config.fixes.<code>` names the fix."""

    code: str
    severity: Severity
    message: Message
    line: int | None = None
    fix: Edit | None = None
    choose: str | None = None
    """The DeepSpeed choice of the launch page that mends it, where no edit of the config does."""
    fix_message: Message | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a config is checked against. None: not known, and what depends on it is not checked."""

    model: ModelFacts | None = None
    data: DataFacts | None = None
    machine: Machine = field(default_factory=Machine)
    world_size: int = 1
    deepspeed: str | None = None
    """Stage and offload of the DeepSpeed setting training will start with, as XTuner names its own: `deepspeed_zero2`."""
    setting: Setting | None = None
    """Its JSON, where that is to be checked too."""
    own_model: ModelFacts | None = None
    """What a fix puts in where the config's model is not on this machine."""
    own_data: DataFacts | None = None
    root: Path = Path()
    """Where the trainer works, and relative paths begin."""


Check = Callable[[ConfigSource, Context], Iterator[Finding]]


def found(
    code: str,
    severity: Severity,
    *,
    line: int | None = None,
    fix: Edit | None = None,
    choose: str | None = None,
    **params: object,
) -> Finding:
    """A finding whose sentences are `config.checks.<code>` and, with a fix or a choice, `config.fixes.<code>`."""
    fix_message = None if fix is None and choose is None else message(f"config.fixes.{code}", **params)
    return Finding(code, severity, message(f"config.checks.{code}", **params), line, fix, choose, fix_message)


def number(source: ConfigSource, path: str, default: float) -> float:
    """A number as training uses it; `default` where the config has none or hides it in an expression."""
    value = source.effective(path, default)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def iterations_per_epoch(source: ConfigSource, context: Context) -> tuple[int, int] | None:
    """Fewest and most micro-steps of one epoch on each rank, guessed from rows and file size; None without data."""
    if context.data is None:
        return None
    per_step = max(1.0, number(source, "batch_size", 1) * context.world_size)
    if not source.effective("pack_to_max_length", True):
        steps = max(1, int(context.data.rows / per_step))
        return steps, steps
    length = max(1.0, number(source, "max_length", 2048))
    low, high = (max(1, int(context.data.size_bytes * share / length / per_step)) for share in _TOKENS_PER_BYTE)
    return low, high
