"""What every test stands on: one environment, and devices of its own, so that no run of another test or of this machine makes it wait."""

import os
import uuid

import pytest

_ENVIRONMENT = os.environ


@pytest.fixture(autouse=True)
def one_environment() -> None:
    """`os.environ` is the object that it was when our modules took it as a default: `datasets`, imported, puts a copy in its place."""
    os.environ = _ENVIRONMENT  # noqa: B003 - the very object is meant


@pytest.fixture(autouse=True)
def own_devices(
    one_environment: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_DEVICES", str(tmp_path_factory.getbasetemp() / "devices" / uuid.uuid4().hex))
