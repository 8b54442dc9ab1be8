"""GPUs as a made-up NVML tells of them: none, sixteen, cut by MIG, lost, and each of its functions failing."""
# ruff: noqa: N802  (the names are those of NVML)

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from core import gpu
from core.launchers.local import list_gpus
from core.runs.gpu_sensors import GpuSensors


class FakeError(Exception):
    pass


class FakeNvml:
    """`cards`, of which those in `mig` are cut into two slices; whatever is named in `failing` raises."""

    NVMLError = FakeError

    def __init__(
        self, cards: int = 1, *, mig: tuple[int, ...] = (), failing: str = "", lost: tuple[int, ...] = ()
    ) -> None:
        self.cards, self.mig, self.failing, self.lost = cards, mig, failing, lost

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "failing"):
            return self._refuse
        try:
            return object.__getattribute__(self, name)
        except AttributeError:
            if name.startswith("NVML_"):
                return getattr(pynvml, name)
            raise

    def _refuse(self, *_: Any) -> None:
        raise FakeError(self.failing)

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return self.cards

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index in self.lost:
            raise FakeError("GPU is lost")
        return f"GPU-{index}"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if not self.mig:
            raise FakeError("not supported")
        return [int(int(handle.split("-")[1]) in self.mig), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, _handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index >= 2:
            raise FakeError("not found")
        return f"MIG-{handle}-{index}"

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        total = 10 if handle.startswith("MIG") else 80
        return SimpleNamespace(total=total, used=1, free=total - 1)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self._of_card(handle, 50))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._of_card(handle, 300_000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self._of_card(handle, 700_000)

    def nvmlDeviceGetTemperature(self, handle: str, _sensor: int) -> int:
        return self._of_card(handle, 60)

    def nvmlDeviceGetClockInfo(self, handle: str, _clock: int) -> int:
        return self._of_card(handle, 1500)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._of_card(handle, 0x24)

    def nvmlDeviceGetTotalEccErrors(self, handle: str, _kind: int, _counter: int) -> int:
        return self._of_card(handle, 0)

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[Any]:
        return [SimpleNamespace(pid=2), SimpleNamespace(pid=1), SimpleNamespace(pid=2)]

    @staticmethod
    def _of_card(handle: str, value: int) -> int:
        """What a slice does not know."""
        if handle.startswith("MIG"):
            raise FakeError("not supported")
        return value


NEEDED = ("nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo")
"""Without these nothing can be started on a card."""
FUNCTIONS = sorted(name for name in vars(FakeNvml) if name.startswith("nvmlDevice"))


def test_sixteen_cards_are_sixteen() -> None:
    found = gpu.devices(FakeNvml(16))
    assert [(card.index, card.uuid) for card in found] == [(number, f"GPU-{number}") for number in range(16)]
    assert found[15].throttle_reasons == ("power_cap", "thermal")
    assert (found[15].power_watts, found[15].process_ids) == (300.0, (1, 2))
    assert [reading["index"] for reading in GpuSensors(FakeNvml(16)).read()] == list(range(16))
    assert [card.uuid for card in list_gpus(FakeNvml(16))] == [f"GPU-{number}" for number in range(16)]


def test_slices_stand_in_for_a_card_that_is_cut() -> None:
    names = ["GPU-0", "MIG-GPU-1-0", "MIG-GPU-1-1", "GPU-2"]
    found = gpu.devices(FakeNvml(3, mig=(1,)))
    assert [card.uuid for card in found] == names
    assert (found[1].memory_total_bytes, found[1].power_watts, found[1].utilization_percent) == (10, None, None)
    readings = GpuSensors(FakeNvml(3, mig=(1,))).read()
    assert [reading["uuid"] for reading in readings] == names
    assert [reading["memory_total_bytes"] for reading in readings] == [80, 10, 10, 80]
    assert [(card.uuid, card.memory_bytes) for card in list_gpus(FakeNvml(3, mig=(1,)))] == list(
        zip(names, [80, 10, 10, 80], strict=True)
    ), "a run is offered the slices, not the card"


def test_a_card_that_fell_off_the_bus_takes_no_other_with_it() -> None:
    nvml = FakeNvml(3, lost=(1,))
    assert [card.uuid for card in gpu.devices(nvml)] == ["GPU-0", "GPU-2"]
    assert [reading["uuid"] for reading in GpuSensors(nvml).read()] == ["GPU-0", "GPU-2"]
    assert [card.uuid for card in list_gpus(nvml)] == ["GPU-0", "GPU-2"]


def test_a_card_may_be_lost_while_it_is_watched() -> None:
    nvml = FakeNvml(2)
    sensors = GpuSensors(nvml)
    assert len(sensors.read()) == 2
    nvml.failing = "nvmlDeviceGetMemoryInfo"
    assert [reading["memory_used_bytes"] for reading in sensors.read()] == [None, None]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_sensor_that_fails_is_unknown_and_nothing_more(function: str) -> None:
    for cards in (FakeNvml(2, failing=function), FakeNvml(2, mig=(0,), failing=function)):
        found, readings = gpu.devices(cards), GpuSensors(cards).read()
        known = list_gpus(cards)
        assert len(known) == (0 if function in NEEDED else len(found))
        if function in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
            assert (found, readings) == ((), [])
        else:
            assert len(found) == len(readings) >= 2


def test_without_a_driver_or_its_binding_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.devices(FakeNvml(failing="nvmlInit")) == ()
    assert list_gpus(FakeNvml(failing="nvmlInit")) == []
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert gpu.devices() == ()
    assert GpuSensors().read() == []
