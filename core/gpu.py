"""What NVML says about the GPUs at this moment. Knows sensors and processes; knows nothing of training.

A sensor that a card lacks is None. Without a driver or without `pynvml` there are no devices, and that is no error.
"""

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

_THROTTLES: Final = {
    0x0000000000000004: "power_cap",
    0x0000000000000008: "hardware_slowdown",
    0x0000000000000020: "thermal",
    0x0000000000000040: "hardware_thermal",
    0x0000000000000080: "power_brake",
}
"""Clock event bits of nvml.h that mean slower than asked; idle and application clocks are no throttling."""


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One GPU, or one MIG slice of it, at one moment."""

    index: int
    uuid: str | None
    name: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    memory_free_bytes: int | None
    utilization_percent: int | None
    power_watts: float | None
    power_limit_watts: float | None
    temperature_celsius: int | None
    sm_clock_mhz: int | None
    throttle_reasons: tuple[str, ...] | None
    """Why the clock is lower than it could be: power_cap, thermal, …; empty if it is not."""
    process_ids: tuple[int, ...] | None
    """Processes that compute on it, of all users."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def devices(library: Any = None) -> tuple[GpuSnapshot, ...]:
    """A snapshot of every GPU. `library`: something with the functions of `pynvml`, which is the default.

    Where a card is cut by MIG its slices are listed in its place: they are what a process can use.
    """
    nvml = library if library is not None else _pynvml()
    if nvml is None:
        return ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        count = _ask(nvml, nvml.nvmlDeviceGetCount) or 0
        handles = [
            handle
            for index in range(count)
            if (handle := _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)) is not None
        ]
        usable = [part for handle in handles for part in (_slices(nvml, handle) or [handle])]
        return tuple(_snapshot(nvml, index, handle) for index, handle in enumerate(usable))
    finally:
        _ask(nvml, nvml.nvmlShutdown)


def _pynvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _slices(nvml: Any, handle: Any) -> list[Any]:
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if not mode or not mode[0]:
        return []
    count = _ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    found = (_ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in range(count))
    return [part for part in found if part is not None]


def _snapshot(nvml: Any, index: int, handle: Any) -> GpuSnapshot:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    utilization = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    power = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    limit = _ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    reasons = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    processes = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    return GpuSnapshot(
        index=index,
        uuid=_text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)),
        name=_text(_ask(nvml, nvml.nvmlDeviceGetName, handle)),
        memory_total_bytes=memory.total if memory else None,
        memory_used_bytes=memory.used if memory else None,
        memory_free_bytes=memory.free if memory else None,
        utilization_percent=utilization.gpu if utilization else None,
        power_watts=power / 1000 if power is not None else None,
        power_limit_watts=limit / 1000 if limit is not None else None,
        temperature_celsius=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        sm_clock_mhz=_ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        throttle_reasons=None if reasons is None else tuple(name for bit, name in _THROTTLES.items() if reasons & bit),
        process_ids=None if processes is None else tuple(sorted({process.pid for process in processes})),
    )


def _ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None if this card, slice or driver has none."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
