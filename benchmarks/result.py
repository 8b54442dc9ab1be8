"""What a benchmark returns, and on what machine it ran."""

import operator
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

NEEDS_GPU: Final = frozenset(
    {"autotune", "train", "deliver_large", "gpu_proof", "kernels", "memory", "multigpu", "watching"}
)
_COMPARE: Final = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}


class NoGpu(Exception):
    """The benchmark needs a GPU and this machine has none; it refuses to pretend."""


@dataclass(frozen=True, slots=True)
class Result:
    """Figures by key (the unit is in the key), and what some of them must be."""

    figures: Mapping[str, float | int | str | None]
    targets: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Key of a figure → (comparison, value), such as `("<", 3.0)`."""

    @property
    def missed(self) -> list[str]:
        """Keys of figures that miss their target, or that have none to show."""
        return [key for key, (sign, value) in self.targets.items() if not _holds(self.figures.get(key), sign, value)]

    @property
    def ok(self) -> bool:
        return not self.missed


def _holds(figure: float | str | None, sign: str, value: float) -> bool:
    return isinstance(figure, int | float) and bool(_COMPARE[sign](figure, value))


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and cards, for the line of a benchmark."""
    import psutil

    from core.gpu import devices

    return {
        "platform": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [device.name for device in devices()],
    }
