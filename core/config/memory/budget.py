"""The memory budget of a training before it starts: peak, what nvidia-smi will show as a range, and how sure that is.

From the config and the headers of the weight files alone. Says which path it speaks of: XTuner's own, or the speed layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from core.config.memory import formula
from core.config.memory.fast import FAMILIES, FastPeak, fast_peak
from core.config.memory.formula import MIB
from core.config.memory.moments import Part, Peak, peak
from core.config.memory.setup import Engine, Setup, Start, model_folder, read_setup
from core.config.memory.shape import Shape, read_shape
from core.config.source import ConfigSource
from core.errors import InputError
from core.messages import Message, message

CONTEXT_BYTES: Final = 1333 * MIB
"""CUDA context and libraries of one process, measured on an H100 with torch 2.11."""
_COLLECTIVES_BYTES: Final = (300 * MIB, 1500 * MIB)
"""NCCL's buffers where there are several ranks: a guess, not measured."""
_CACHED: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {"qlora": (1.02, 1.42), "lora": (1.02, 1.42), "full": (1.12, 1.6)}
)
"""Reserved by torch's allocator for each byte allocated at the peak: cached blocks and gaps. Measured on an H100 (docs/memory.md)."""
_ROUGH: Final = 1.25
"""Stretch of the upper end for a model the formula was not made for."""


class Verdict(StrEnum):
    FITS = "fits"
    TIGHT = "tight"
    """The peak fits; with the allocator's cache it may not."""
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one GPU will hold."""

    shape: Shape
    setup: Setup
    peak: Peak
    """Of the stock path."""
    fast: FastPeak | None
    """With the speed layer; None where it is not asked for or cannot run."""
    allocated_bytes: int
    """Peak of `torch.cuda.max_memory_allocated`, corrected by what was measured before."""
    shown_bytes: tuple[int, int]
    """What nvidia-smi will show at least and at most."""
    correction: float
    """Measured over estimated in earlier runs; 1.0 where there are none."""
    doubts: tuple[Message, ...]
    """Why it may be further off than usual."""
    free_bytes: int | None
    """What the speed layer's plan was made for."""

    @property
    def needed_bytes(self) -> int:
        """What must be there for it to run at all: the peak, or the speed layer's least need."""
        return round(self.fast.least * self.correction) if self.fast else self.allocated_bytes

    @property
    def parts(self) -> dict[Part, int]:
        """Of the peak on the path it speaks of, from the bottom of the bar, without empty ones."""
        sizes = self.fast.parts if self.fast else self.peak.parts
        return {part: sizes[part] for part in Part if sizes.get(part, 0) > 0}

    def verdict(self, free_bytes: int) -> Verdict:
        """Against the free memory of the fullest GPU."""
        low, high = self.shown_bytes
        if low > free_bytes:
            return Verdict.TOO_LARGE
        return Verdict.FITS if high <= free_bytes else Verdict.TIGHT


def read_budget(
    source: ConfigSource, start: Start, *, free_bytes: int | None = None, correction: float = 1.0
) -> Budget:
    """The budget of a config as it would start. Raises InputError `budget.no_model`, `budget.no_shape`.

    `free_bytes`: of the fullest GPU; only the speed layer's plan depends on it.
    """
    folder = model_folder(source)
    if folder is None or not folder.is_dir():
        raise InputError("budget.no_model", path=str(folder or "?"))
    shape = read_shape(folder)
    stored = "float32" if shape.weight_bytes_each == 4 else "bfloat16"
    return make_budget(
        shape,
        read_setup(source, start, model_type=shape.model_type, stored=stored),
        free_bytes=free_bytes,
        correction=correction,
    )


def make_budget(shape: Shape, setup: Setup, *, free_bytes: int | None = None, correction: float = 1.0) -> Budget:
    worst = peak(shape, setup)
    fast = None
    if setup.is_fast and _can_be_fast(shape, setup):
        fast = fast_peak(shape, setup, formula.count(shape, setup), free_bytes or 2**62)
    allocated = round((fast.settled if fast else worst.total) * correction)
    low, high = _CACHED[setup.method]
    # Between ranks of one machine the peaks are alike: data parallel training gives each the same work.
    least, most = _COLLECTIVES_BYTES if setup.world_size > 1 else (0, 0)
    doubts = _doubts(shape, setup)
    stretch = _ROUGH if not shape.is_known else 1.0
    floor = round((fast.least if fast else worst.total) * correction * (1.0 if fast else low))
    shown = (floor + CONTEXT_BYTES + least, round(allocated * high * stretch) + CONTEXT_BYTES + most)
    if fast and free_bytes:
        # It plans within what is free and gives back what it does not need.
        shown = (shown[0], max(shown[0], min(shown[1], free_bytes)))
    return Budget(shape, setup, worst, fast, allocated, shown, correction, doubts, free_bytes)


def _can_be_fast(shape: Shape, setup: Setup) -> bool:
    can_step = setup.engine is Engine.AMP or (setup.engine is Engine.DEEPSPEED and setup.stage < 3)
    return shape.model_type in FAMILIES and setup.is_adapted and can_step


def _doubts(shape: Shape, setup: Setup) -> tuple[Message, ...]:
    found = []
    if not shape.is_known:
        found.append(message("budget.doubts.unknown_model", model_type=shape.model_type or "?"))
    if not shape.is_from_headers:
        found.append(message("budget.doubts.no_headers"))
    if setup.world_size > 1:
        found.append(message("budget.doubts.several_ranks"))
    if setup.is_offloaded or setup.offloads_parameters:
        found.append(message("budget.doubts.not_measured"))
    if setup.engine is Engine.PLAIN:
        found.append(message("budget.doubts.no_amp"))
    return tuple(found)
