"""GPU sensors with a made-up NVML: what they read, what a card lacks, and that every name exists in the real library."""
# ruff: noqa: N802  (the names are those of NVML)

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

import core.runs.gpu_sensors
from core.runs.gpu_sensors import GpuSensors, bytes_left, gpu_memory_bytes


class FakeError(Exception):
    pass


class FakeNvml:
    """Two cards; the second knows neither power nor ECC. Xid events come from `events`."""

    NVMLError = FakeError

    def __init__(self, *events: tuple[int, int], is_broken: bool = False) -> None:
        self.events, self.is_broken = list(events), is_broken
        self.registered: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML_") or name == "nvmlEventTypeXidCriticalError":
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.is_broken:
            raise FakeError

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMigMode(self, _index: int) -> list[int]:
        raise FakeError("not supported")

    def nvmlDeviceGetMemoryInfo(self, index: int) -> Any:
        return SimpleNamespace(used=(index + 1) * 100, total=1000)

    def nvmlDeviceGetUtilizationRates(self, index: int) -> Any:
        return SimpleNamespace(gpu=50 + index)

    def nvmlDeviceGetPowerUsage(self, index: int) -> int:
        return self._only_first(index, 250_000)

    def nvmlDeviceGetUUID(self, index: int) -> bytes:
        return f"GPU-{index}".encode()

    def nvmlDeviceGetTemperature(self, index: int, _sensor: int) -> int:
        return 60

    def nvmlDeviceGetClockInfo(self, index: int, _clock: int) -> int:
        return 1500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, index: int) -> int:
        return 0x4

    def nvmlDeviceGetTotalEccErrors(self, index: int, _kind: int, _counter: int) -> int:
        return self._only_first(index, 3)

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, index: int, _kinds: int, _events: object) -> None:
        self.registered.append(index)

    def nvmlEventSetWait_v2(self, _events: object, timeout: int) -> Any:
        assert timeout == 0, "the sampler never waits"
        if not self.events:
            raise FakeError("timeout")
        index, code = self.events.pop(0)
        return SimpleNamespace(device=index, eventData=code)

    @staticmethod
    def _only_first(index: int, value: int) -> int:
        if index:
            raise FakeError("not supported")
        return value


def test_reads_what_the_cards_say() -> None:
    first, second = GpuSensors(FakeNvml()).read()
    assert (first["uuid"], first["power_watts"], first["ecc_uncorrected"], first["throttle_reasons"]) == (
        "GPU-0",
        250.0,
        3,
        4,
    )
    assert (second["memory_used_bytes"], second["power_watts"], second["ecc_uncorrected"]) == (200, None, None)
    assert "xids" not in first


def test_xids_are_told_once_and_for_their_card() -> None:
    nvml = FakeNvml((1, 79), (1, 48))
    sensors = GpuSensors(nvml)
    assert "xids" not in sensors.read()[1], "nobody has asked yet"
    sensors.watch_xids()
    assert nvml.registered == [0, 1]
    first, second = sensors.read()
    assert ("xids" in first, second["xids"]) == (False, [79, 48])
    assert "xids" not in sensors.read()[1]


def test_without_a_driver_there_are_no_gpus() -> None:
    sensors = GpuSensors(FakeNvml(is_broken=True))
    sensors.watch_xids()
    assert sensors.read() == []


@pytest.mark.parametrize("module", ["core/runs/gpu_sensors.py", "core/runs/devices.py", "core/gpu.py"])
def test_every_nvml_name_exists(module: str) -> None:
    root = Path(core.runs.gpu_sensors.__file__).parents[2]
    tree = ast.parse((root / module).read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = {name for name in names if name.startswith(("nvml", "NVML"))}
    assert used
    assert not {name for name in used if not hasattr(pynvml, name)}


def test_memory_that_is_not_given_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    seen = iter([9 * gib, 5 * gib, gib])
    monkeypatch.setattr("core.runs.gpu_sensors.gpu_memory_bytes", lambda _gpus: next(seen))
    waits: list[None] = []
    assert bytes_left(["GPU-0"], gib, lambda: waits.append(None)) == 0
    assert len(waits) == 2, "the driver gets some time"
    monkeypatch.setattr("core.runs.gpu_sensors.gpu_memory_bytes", lambda _gpus: 3 * gib)
    monkeypatch.setattr("core.runs.gpu_sensors._RELEASE_SECONDS", 0.0)
    assert bytes_left(["GPU-0"], gib, lambda: None) == 2 * gib
    assert bytes_left(["GPU-0"], None, lambda: None) is None
    assert bytes_left(["GPU-0"], 3 * gib, lambda: None) == 0


def test_without_gpus_there_is_nothing_to_count() -> None:
    assert gpu_memory_bytes([]) is None
    assert bytes_left([], None, lambda: None) is None
