"""What every test stands on: one environment, and devices of its own, so that no run of another test or of this machine makes it wait."""

import os
import random
import sys
import uuid

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

_ENVIRONMENT = os.environ

# The same examples everywhere, however slow the machine is.
settings.register_profile("danlu", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("danlu")


@pytest.fixture(autouse=True)
def one_environment() -> None:
    """`os.environ` is the object that it was when our modules took it as a default: `datasets`, imported, puts a copy in its place."""
    os.environ = _ENVIRONMENT  # noqa: B003 - the very object is meant


@pytest.fixture(autouse=True)
def same_chance() -> None:
    """Random numbers are the same whatever test went before."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def own_devices(
    one_environment: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_DEVICES", str(tmp_path_factory.getbasetemp() / "devices" / uuid.uuid4().hex))
