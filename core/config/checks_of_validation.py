"""Checks of validation: its data, how often, early stopping, and what it cannot be combined with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from core.config.edits import data_files
from core.config.facts import read_data
from core.config.findings import Check, Context, Finding, Severity, found, iterations_per_epoch, number
from core.config.source import ConfigSource
from core.config.validation import (
    BLOCK,
    Validation,
    added_time,
    facts_of,
    read_validation,
    set_validation,
    sibling,
    usual_every,
)

_EVERY: Final = f"{BLOCK}.every_n_iters"
_FEW_ROWS: Final = 20
_DEAR: Final = 0.25
"""Validation may take this share of the training time before it is said."""


def check_validation_files(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The files exist, hold other rows than the training data, and are read by the function for their format."""
    validation = read_validation(source)
    if validation is None:
        yield from _held_out(source, context.root)
        return
    line, part = _line(source), _split_part(source, context.root)
    fix = lambda edited: set_validation(edited, read_data(part) if part else None)  # noqa: E731
    offer = part.name if part else "–"
    for name in validation.files:
        if not (context.root / name).is_file():
            yield found("validation_missing", Severity.ERROR, line=line, fix=fix, path=name, offer=offer)
            return
    same = [name for name in validation.files if _is_among(name, data_files(source), context.root)]
    if same:
        yield found("validation_same", Severity.WARNING, line=line, fix=fix, path=same[0], offer=offer)
        return
    facts = facts_of(validation, context.root)
    if facts is None:
        return
    if not facts.is_native:
        yield found("validation_format", Severity.ERROR, line=line, path=str(facts.path), format=str(facts.format))
        return
    if facts.rows < _FEW_ROWS:
        yield found("validation_few", Severity.ADVICE, line=line, rows=facts.rows)
    written = str(source.get(f"{BLOCK}.dataset.dataset_map_fn", None)).rpartition(".")[2]
    if written != str(facts.map_fn):
        mend = lambda edited: set_validation(edited, facts)  # noqa: E731
        line = source.line_of(f"{BLOCK}.dataset.dataset_map_fn")
        wanted = str(facts.map_fn)
        yield found("validation_map_fn", Severity.ERROR, line=line, fix=mend, written=written, wanted=wanted)


def check_validation_interval(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """It comes within the training, between two steps of the optimizer, and does not take more time than it is worth."""
    validation = read_validation(source)
    if validation is None:
        return
    line, counts = source.line_of(_EVERY), int(max(1, number(source, "accumulative_counts", 1)))
    if validation.every % counts:
        rounded = counts * max(1, round(validation.every / counts))
        mend = lambda edited: edited.set(_EVERY, rounded)  # noqa: E731
        yield found(
            "validation_freq", Severity.WARNING, line=line, fix=mend, every=validation.every, counts=counts,
            rounded=rounded,
        )  # fmt: skip
    total = _total(source, context)
    if total is None:
        return
    usual = usual_every(source, context)
    if validation.every > total[1]:
        mend = lambda edited: edited.set(_EVERY, usual)  # noqa: E731
        yield found(
            "validation_never", Severity.WARNING, line=line, fix=mend, every=validation.every, most=int(total[1]),
            usual=usual,
        )  # fmt: skip
    elif validation.patience and validation.every * validation.patience > total[1]:
        fewer = max(1, int(total[1] // (3 * validation.every)))
        mend = lambda edited: edited.set(f"{BLOCK}.patience", fewer)  # noqa: E731
        line = source.line_of(f"{BLOCK}.patience")
        yield found(
            "patience_too_long", Severity.ADVICE, line=line, fix=mend, patience=validation.patience,
            every=validation.every, most=int(total[1]), fewer=fewer,
        )  # fmt: skip
    yield from _dear(source, context, validation, counts)


def check_validation_place(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Sequence parallelism splits a text over cards, in a way that the validation pass does not know."""
    del context
    validation, size = read_validation(source), int(number(source, "sequence_parallel_size", 1))
    if validation is not None and size > 1:
        off = lambda edited: set_validation(edited, None)  # noqa: E731
        yield found("validation_parallel", Severity.ERROR, line=_line(source), fix=off, size=size)


VALIDATION_CHECKS: Final[tuple[Check, ...]] = (
    check_validation_files,
    check_validation_interval,
    check_validation_place,
)


def _held_out(source: ConfigSource, root: Path) -> Iterator[Finding]:
    """Half of a split that nobody uses: a person who split the data wanted to validate on it."""
    file = _split_part(source, root)
    if file is not None:
        fix = lambda edited: set_validation(edited, read_data(file))  # noqa: E731
        yield found("validation_unused", Severity.ADVICE, fix=fix, file=file.name)


def _dear(source: ConfigSource, context: Context, validation: Validation, counts: int) -> Iterator[Finding]:
    added = added_time(source, context)
    share = added / (1 + added)
    if share > _DEAR:
        # One pass over the validation data, in micro-steps of training.
        passes = added * validation.every
        enough = counts * max(1, round(passes * (1 / _DEAR - 1) / counts) + 1)
        mend = lambda edited: edited.set(_EVERY, enough)  # noqa: E731
        yield found(
            "validation_dear", Severity.ADVICE, line=source.line_of(_EVERY), fix=mend, percent=round(100 * share),
            enough=enough, every=validation.every,
        )  # fmt: skip


def _total(source: ConfigSource, context: Context) -> tuple[float, float] | None:
    per_epoch = iterations_per_epoch(source, context)
    epochs = number(source, "max_epochs", 1)
    return None if per_epoch is None else (epochs * per_epoch[0], epochs * per_epoch[1])


def _line(source: ConfigSource) -> int | None:
    return source.line_of(f"{BLOCK}.dataset.dataset.data_files")


def _split_part(source: ConfigSource, root: Path) -> Path | None:
    files = data_files(source)
    return sibling(root / files[0]) if len(files) == 1 else None


def _is_among(name: str, files: list[str], root: Path) -> bool:
    return any((root / name).resolve() == (root / file).resolve() for file in files)
