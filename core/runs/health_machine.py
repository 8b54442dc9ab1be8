"""What can be wrong with the machine under a training run. One class a symptom, fed with one gpu.jsonl line at a time. Stdlib only."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final, Protocol

from core.runs.findings import Finding, number

_WINDOW: Final = 30
"""Samples: about a minute."""
_THERMAL: Final = 0x20 | 0x40
"""nvml.h: clocks lowered by software or hardware because of the temperature."""
_POWER_BRAKE: Final = 0x80
"""nvml.h: the power supply has told the card to slow down."""
Findings = dict[str, Finding | None]
"""By subject: the GPU, or "" for the machine."""


class MachineDetector(Protocol):
    """Looks at each sample; says what it finds. Takes the UUIDs or indices of the run's own GPUs."""

    kind: ClassVar[str]

    def __init__(self, gpus: tuple[str, ...]) -> None: ...

    def see(self, sample: Mapping[str, Any]) -> Findings: ...


class _Throttling:
    """In half of the last minute's samples a bit of the throttle reasons was set."""

    bits: ClassVar[int]

    def __init__(self, gpus: tuple[str, ...]) -> None:
        self._gpus = gpus
        self._seen: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=_WINDOW))

    def see(self, sample: Mapping[str, Any]) -> Findings:
        found: Findings = {}
        for name, gpu in _own(sample, self._gpus):
            reasons = gpu.get("throttle_reasons")
            if not isinstance(reasons, int):
                continue
            seen = self._seen[name]
            seen.append(bool(reasons & self.bits))
            is_on = len(seen) == _WINDOW and 2 * sum(seen) >= _WINDOW
            params = {
                "gpu": name,
                "percent": round(100 * sum(seen) / len(seen)),
                "celsius": gpu.get("temperature_celsius"),
                "mhz": gpu.get("sm_clock_mhz"),
            }
            found[name] = Finding("warning", params) if is_on else None
        return found


class Thermal(_Throttling):
    """The card runs slower because it is hot."""

    kind: ClassVar[str] = "thermal"
    bits: ClassVar[int] = _THERMAL


class PowerBrake(_Throttling):
    """The card runs slower because the power supply says so."""

    kind: ClassVar[str] = "power_brake"
    bits: ClassVar[int] = _POWER_BRAKE


class Ecc:
    """Memory errors that the card could not correct, since the start of the watch."""

    kind: ClassVar[str] = "ecc"

    def __init__(self, gpus: tuple[str, ...]) -> None:
        self._gpus = gpus
        self._first: dict[str, float] = {}

    def see(self, sample: Mapping[str, Any]) -> Findings:
        found: Findings = {}
        for name, gpu in _own(sample, self._gpus):
            count = number(gpu, "ecc_uncorrected")
            if count is not None:
                new = count - self._first.setdefault(name, count)
                found[name] = Finding("error", {"gpu": name, "count": round(new)}) if new > 0 else None
        return found


class Xid:
    """The driver reported an error of the card (Xid). It stays until the run ends."""

    kind: ClassVar[str] = "xid"

    def __init__(self, gpus: tuple[str, ...]) -> None:
        self._gpus = gpus
        self._codes: dict[str, list[int]] = defaultdict(list)

    def see(self, sample: Mapping[str, Any]) -> Findings:
        for name, gpu in _own(sample, self._gpus):
            self._codes[name] += [code for code in gpu.get("xids") or [] if code not in self._codes[name]]
        return {
            name: Finding("error", {"gpu": name, "codes": ", ".join(map(str, codes))})
            for name, codes in self._codes.items()
            if codes
        }


class GpuIdle:
    """All GPUs of the run have done next to nothing for a minute, though it has taken steps before."""

    kind: ClassVar[str] = "gpu_idle"
    _percent, _busy_percent = 5.0, 20.0

    def __init__(self, gpus: tuple[str, ...]) -> None:
        self._gpus = gpus
        self._seen: deque[float] = deque(maxlen=_WINDOW)
        self._has_worked = False

    def see(self, sample: Mapping[str, Any]) -> Findings:
        busy = [
            value for _, gpu in _own(sample, self._gpus) if (value := number(gpu, "utilization_percent")) is not None
        ]
        if not self._gpus or not busy:
            return {}
        self._seen.append(max(busy))
        self._has_worked = self._has_worked or max(busy) > self._busy_percent
        is_on = self._has_worked and len(self._seen) == _WINDOW and max(self._seen) < self._percent
        return {"": Finding("warning", {"percent": round(max(self._seen))}) if is_on else None}


class OomKiller:
    """The kernel has ended a process of this machine for want of memory."""

    kind: ClassVar[str] = "oom_killer"

    def __init__(self, gpus: tuple[str, ...]) -> None:
        del gpus
        self._first: float | None = None

    def see(self, sample: Mapping[str, Any]) -> Findings:
        count = number(sample, "oom_kills")
        if count is None:
            return {}
        self._first = count if self._first is None else self._first
        return {"": Finding("error", {"count": round(count - self._first)}) if count > self._first else None}


class MemoryFull:
    """More than 95 % of the machine's memory in use, five samples in a row: the OOM killer is near."""

    kind: ClassVar[str] = "memory"
    _share, _needed = 0.95, 5

    def __init__(self, gpus: tuple[str, ...]) -> None:
        del gpus
        self._in_a_row = 0

    def see(self, sample: Mapping[str, Any]) -> Findings:
        used, total = number(sample, "ram_used_bytes"), number(sample, "ram_total_bytes")
        if used is None or not total:
            return {}
        self._in_a_row = self._in_a_row + 1 if used > self._share * total else 0
        return {
            "": Finding("warning", {"percent": round(100 * used / total)}) if self._in_a_row >= self._needed else None
        }


MACHINE_DETECTORS: Final[tuple[Callable[[tuple[str, ...]], MachineDetector], ...]] = (
    Thermal,
    PowerBrake,
    Ecc,
    Xid,
    GpuIdle,
    OomKiller,
    MemoryFull,
)


def _own(sample: Mapping[str, Any], gpus: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and readings of the run's own GPUs."""
    for gpu in sample.get("gpus") or []:
        if gpu.get("uuid") in gpus or str(gpu.get("index")) in gpus:
            yield f"GPU {gpu.get('index')}", gpu
