"""Ranks of a run as threads of the test: real gloo between them, no processes."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two, that hear one another."""
    from torch import distributed

    from core.xtuner.runtime.ranks import Ranks

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store, patience = distributed.HashStore(), timedelta(minutes=10)
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: distributed.ProcessGroupGloo(store, rank, 2, patience), range(2)))
    return [Ranks(group) for group in groups]
