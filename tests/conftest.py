"""What every test stands on: devices of its own, so that no run of another test, or of this machine, makes its runs wait."""

import uuid

import pytest


@pytest.fixture(autouse=True)
def own_devices(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_DEVICES", str(tmp_path_factory.getbasetemp() / "devices" / uuid.uuid4().hex))
