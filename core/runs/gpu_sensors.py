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
        self._cards: list[Any] = []
        """One for each card, without those that have fallen off the bus."""
        self._usable: list[tuple[Any, Any]] = []
        """What a process can use, and the card it lies on: the card itself, or its MIG slices."""
        self._events: Any = None
        nvml = library if library is not None else _pynvml()
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError:
            return
        self._nvml = nvml
        found = (self._ask(nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count))
        self._cards = [card for card in found if card is not None]
        self._usable = [(part, card) for card in self._cards for part in (self._slices(card) or [card])]

    def read(self) -> list[dict[str, Any]]:
        readings = [self._read(index, part) for index, (part, _) in enumerate(self._usable)]
        xids = self._take_xids()
        for reading, (_, card) in zip(readings, self._usable, strict=True):
            if codes := xids.get(self._uuid(card) or ""):
                reading["xids"] = codes
        return readings

    def _slices(self, card: Any) -> list[Any]:
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode, card)
        if not mode or not mode[0]:
            return []
        count = self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, card) or 0
        found = (self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, index) for index in range(count))
        return [part for part in found if part is not None]

    def _uuid(self, handle: Any) -> str | None:
        uuid = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
        return uuid.decode() if isinstance(uuid, bytes) else uuid

    def _read(self, index: int, handle: Any) -> dict[str, Any]:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        return {
            "index": index,
            "uuid": self._uuid(handle),
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
        for card in self._cards if self._events is not None else []:
            self._ask(self._nvml.nvmlDeviceRegisterEvents, card, self._nvml.nvmlEventTypeXidCriticalError, self._events)

    def _take_xids(self) -> dict[str, list[int]]:
        """UUID → codes that have come since the last call."""
        found: dict[str, list[int]] = {}
        while self._events is not None:
            event = self._ask(self._nvml.nvmlEventSetWait_v2, self._events, 0)  # a timeout is an NVMLError: None
            if event is None:
                break
            found.setdefault(str(self._uuid(event.device)), []).append(int(event.eventData))
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
