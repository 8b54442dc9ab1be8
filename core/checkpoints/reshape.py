"""Writes a checkpoint anew for another number of ranks, another ZeRO stage, or with and without DeepSpeed, bit for bit.

The source is only read, and no tensor is in memory whole. The result is an ordinary checkpoint, loaded by the ordinary path, and
is compared with the source tensor by tensor before it gets its name. Counters of the training loop are `core.checkpoints.counters`.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from core.checkpoints.counters import carry_counters, check_counters
from core.checkpoints.plain_layout import PlainFile
from core.checkpoints.plain_writer import PlainWriter
from core.checkpoints.tensors import NUMPY_TYPES, DiskTensor
from core.checkpoints.torch_file import TorchFile, save
from core.checkpoints.transfer import Move, move_all
from core.checkpoints.zero_layout import Source, ZeroFolder, load
from core.checkpoints.zero_writer import FolderWriter
from core.errors import InputError
from core.files import require_absent, require_space, tree_size_bytes
from core.messages import message
from core.runs.job import Progress

_SYNC_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class ReshapePlan:
    """What reshaping a checkpoint would do, known before anything is written."""

    source: str
    from_world_size: int
    to_world_size: int
    from_stage: int
    to_stage: int
    parameters: int
    """Trained parameters, elements."""
    size_bytes: int
    """Of the source, and about that of the result."""
    from_iteration: int | None
    to_iteration: int | None
    """Iterations are counted per rank, so the same optimizer step has another number on another number of ranks."""


def plan_reshape(
    source: Path, world_size: int, *, stage: int | None = None, accumulative_counts: int | None = None
) -> ReshapePlan:
    """Read the source's layout and say what would happen. Raises InputError for what is not covered."""
    return _plan(open_source(source), source, world_size, stage, accumulative_counts)


def open_source(path: Path, world_size: int | None = None) -> Source:
    """A checkpoint that can be written anew. `world_size`: of the run that wrote a plain file, which does not say it."""
    return PlainFile(path, world_size or 1) if path.is_file() else ZeroFolder(path)


def _plan(
    opened: Source, source: Path, world_size: int, stage: int | None, accumulative_counts: int | None
) -> ReshapePlan:
    if world_size < 1:
        raise InputError("reshape.bad_world_size", world_size=world_size)
    if stage not in (None, 0, 1, 2, 3):
        raise InputError("reshape.bad_stage", stage=stage)
    iteration = (opened.model_states.get("meta") or {}).get("iter")
    if iteration is not None:
        check_counters(iteration, opened.world_size, world_size, accumulative_counts)
    return ReshapePlan(
        source=str(source),
        from_world_size=opened.world_size,
        to_world_size=world_size,
        from_stage=opened.stage,
        to_stage=opened.stage if stage is None else stage,
        parameters=sum(parameter.elements for parameter in opened.parameters),
        size_bytes=tree_size_bytes(source),
        from_iteration=iteration,
        to_iteration=None if iteration is None else iteration * opened.world_size // world_size,
    )


def reshape(
    source: str,
    target: str,
    world_size: int,
    *,
    progress: Progress,
    stage: int | None = None,
    from_world_size: int | None = None,
    accumulative_counts: int | None = None,
    stretch: Fraction = Fraction(1),
) -> dict[str, Any]:
    """Write `source` for `world_size` ranks to `target`, and compare every master and moment. A job function.

    `stage`: 0 for a plain file, 1 to 3 for a DeepSpeed folder; None: as the source. `from_world_size`: of the run that wrote a
    plain source. `stretch`: see `core.checkpoints.counters.rescale_counters`.

    Returns the plan with `tensors_verified` and `digest`. Raises InputError (not covered), ConflictError (target exists),
    MachineError (no space). A failed or cancelled reshape leaves nothing at `target`.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's classes are unpickled here; no GPU is touched.
    source_path, target_path = Path(source), Path(target)
    before = open_source(source_path, from_world_size)
    plan = _plan(before, source_path, world_size, stage, accumulative_counts)
    require_absent(target_path)
    require_space(target_path.parent, max(plan.size_bytes, _need_bytes(before)))
    unfinished = target_path.with_name(f".{target_path.name}.partial")
    _remove(unfinished)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        states = dict(before.model_states)
        rates = carry_counters(states, before.world_size, world_size, stretch)
        writer = _writer(before, unfinished, world_size, plan.to_stage, rates)
        digest, count = fill(before, writer, states, lambda: open_source(unfinished, world_size), progress)
        if target_path.is_dir():
            target_path.rmdir()  # An empty folder counts as nothing.
        unfinished.rename(target_path)
    finally:
        _remove(unfinished)
    return {**asdict(plan), "target": target, "tensors_verified": count, "digest": digest}


def _need_bytes(before: Source) -> int:
    """Of masters, moments and the model's own weights in their new types: a plain file may hold narrower ones."""
    items = sum(NUMPY_TYPES[before.dtype(key)].itemsize for key in before.keys)
    module = sum(value.nbytes for value in before.module.values() if isinstance(value, DiskTensor))
    return items * sum(parameter.elements for parameter in before.parameters) + module


def _writer(before: Source, target: Path, world_size: int, stage: int, rates: list[float] | None) -> "Writer":
    if stage == 0:
        return PlainWriter(before, target, rates)
    target.mkdir()
    return FolderWriter(before, target, world_size, stage, rates)


def _remove(unfinished: Path) -> None:
    if unfinished.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
    else:
        unfinished.unlink(missing_ok=True)


def rescale_file(
    source: Path, target: Path, old: int, new: int, *, stretch: Fraction = Fraction(1), progress: Progress
) -> None:
    """Write the plain checkpoint `source` of `old` ranks for `new` ranks to the new file `target`: other counters, same tensors.

    Raises InputError (not readable, an unknown schedule), ConflictError (target exists), MachineError (no space).
    """
    require_absent(target)
    require_space(target.parent, source.stat().st_size)
    states = dict(load(source))
    rates = carry_counters(states, old, new, stretch)
    if rates:
        groups = states["optimizer"]["param_groups"]
        changed = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
        states["optimizer"] = {**states["optimizer"], "param_groups": changed}
    progress.update(0, None, message("reshape.writing"))
    unfinished = target.with_name(f".{target.name}.partial")
    try:
        save(unfinished, states)
        unfinished.rename(target)
    finally:
        unfinished.unlink(missing_ok=True)


class Writer(Protocol):
    """Lays out files, and knows what fills them."""

    files: list[TorchFile]

    def lay_out(self, states: dict[str, Any]) -> None: ...

    def moves(self) -> tuple[list[Move], list[Move]]:
        """Masters and moments, all of one key and then of the next, parameters in order; and the rest."""


def fill(
    before: Source, writer: Writer, states: dict[str, Any], read_again: Callable[[], Source], progress: Progress
) -> tuple[str, int]:
    """Lay the files out, move every tensor to its place, then read the result anew and compare every master and moment.

    Returns one digest of all and how many tensors were compared. Raises InputError `reshape.differs`.
    """
    try:
        writer.lay_out(states)
        kept, others = writer.moves()
        advance = _Advance(progress, sum(move.nbytes for move in (*kept, *others, *kept)))
        hashes = move_all([*kept, *others], partial(advance, "writing"))[: len(kept)]
        for file in writer.files:
            file.close()
        with ThreadPoolExecutor(_SYNC_THREADS) as pool:  # The disk takes them in while they are compared.
            synced = [pool.submit(file.sync) for file in writer.files]
            _compare(before, read_again(), hashes, partial(advance, "comparing"))
            for future in synced:
                future.result()
    finally:
        for file in writer.files:
            file.abandon()
    return _digest(before, hashes), len(hashes)


class _Advance:
    """Adds up bytes and tells how far it is."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, phase: str, size_bytes: int) -> None:
        self._done += size_bytes
        self._progress.update(self._done, self._total, message(f"reshape.{phase}"), unit="bytes")


def _compare(before: Source, after: Source, hashes: list[str], done: Callable[[int], None]) -> None:
    described = [
        ([(p.name, p.shape, p.group) for p in each.parameters], {key: each.dtype(key) for key in each.keys})
        for each in (before, after)
    ]
    if described[0] != described[1]:
        raise InputError("reshape.differs", name="parameters", key="shape")
    tensors = [(key, parameter.name) for key in before.keys for parameter in before.parameters]
    again = move_all([Move(after.pieces(name, key), (), after.dtype(key)) for key, name in tensors], done)
    for (key, name), old, new in zip(tensors, hashes, again, strict=True):
        if old != new:
            raise InputError("reshape.differs", name=name, key=key)


def _digest(source: Source, hashes: list[str]) -> str:
    """One hash of all tensors, whatever form they lie in: parameter by parameter, each with all its keys."""
    import xxhash

    total, count = xxhash.xxh3_128(), len(source.parameters)
    for number in range(count):
        for value in hashes[number::count]:
            total.update(bytes.fromhex(value))
    return total.hexdigest()
