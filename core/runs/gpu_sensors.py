"""What NVML says about every GPU at one moment, for the sampler in the supervisor. Stdlib + pynvml; `core.gpu` is for pages.

A sensor that is missing is `None`; nothing here can fail the run.
"""

import time
from collections.abc import Callable
from typing import Any, Final

_SLACK_BYTES: Final = 256 * 2**20
"""GPU memory counts as given back when no more than this is used above what was used before the start."""
_RELEASE_SECONDS: Final = 20.0


class GpuSensors:
    """NVML, opened once. Without a driver or pynvml there are no GPUs, which is no error."""

    def __init__(self, library: Any = None) -> None:
        """`library`: something with the functions of `pynvml`, which is the default."""
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._events: Any = None
        nvml = library if library is not None else _pynvml()
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
            self._nvml = nvml
        except nvml.NVMLError:
            self._handles = []

    def read(self) -> list[dict[str, Any]]:
        readings = [self._read(index, handle) for index, handle in enumerate(self._handles)]
        for uuid, codes in self._take_xids().items():
            for reading in readings:
                if reading["uuid"] == uuid:
                    reading["xids"] = codes
        return readings

    def _read(self, index: int, handle: Any) -> dict[str, Any]:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        uuid = self._ask(nvml.nvmlDeviceGetUUID, handle)
        return {
            "index": index,
            "uuid": uuid.decode() if isinstance(uuid, bytes) else uuid,
            "utilization_percent": None if rates is None else rates.gpu,
            "memory_used_bytes": None if memory is None else memory.used,
            "memory_total_bytes": None if memory is None else memory.total,
            "power_watts": None if power is None else power / 1000,
            "temperature_celsius": self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            "sm_clock_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            "throttle_reasons": self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
            "ecc_uncorrected": self._ask(
                nvml.nvmlDeviceGetTotalEccErrors,
                handle,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            ),
        }

    def watch_xids(self) -> None:
        """From now on `read` tells the errors that the driver reports of a card (Xid), in the sample after they came."""
        if self._nvml is None:
            return
        self._events = self._ask(self._nvml.nvmlEventSetCreate)
        for handle in self._handles if self._events is not None else []:
            self._ask(
                self._nvml.nvmlDeviceRegisterEvents, handle, self._nvml.nvmlEventTypeXidCriticalError, self._events
            )

    def _take_xids(self) -> dict[str, list[int]]:
        """UUID → codes that have come since the last call."""
        found: dict[str, list[int]] = {}
        while self._events is not None:
            event = self._ask(self._nvml.nvmlEventSetWait_v2, self._events, 0)  # a timeout is an NVMLError: None
            if event is None:
                break
            uuid = self._ask(self._nvml.nvmlDeviceGetUUID, event.device)
            name = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
            found.setdefault(name, []).append(int(event.eventData))
        return found

    def _ask(self, query: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return query(*arguments)
        except self._nvml.NVMLError:
            return None


def gpu_memory_bytes(gpus: list[str]) -> int | None:
    """Memory in use on these GPUs (UUIDs or indices), by whomever; None without any, or where NVML does not say."""
    if not gpus:
        return None
    used = [gpu["memory_used_bytes"] for gpu in GpuSensors().read() if gpu["uuid"] in gpus or str(gpu["index"]) in gpus]
    return sum(used) if used and None not in used else None


def bytes_left(gpus: list[str], before: int | None, wait: Callable[[], None]) -> int | None:
    """GPU memory in use above `before` after all processes have ended; the driver gets some time, with `wait` in between.

    0 if it was given back (but for what others may have taken); None where it is not known.
    """
    deadline = time.monotonic() + _RELEASE_SECONDS
    while (now := gpu_memory_bytes(gpus)) is not None and before is not None:
        if now - before <= _SLACK_BYTES:
            return 0
        if time.monotonic() > deadline:
            return now - before
        wait()
    return None


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
