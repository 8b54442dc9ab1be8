"""What the worker computes itself: the loss. What llm-compressor does is tested in test_export, where it is."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.quantize.worker import mean_loss

pytestmark = pytest.mark.engine


def test_the_loss_is_the_mean_over_all_predicted_tokens() -> None:
    import torch

    table = np.random.default_rng(0).normal(size=(40, 40))
    """Logits of the next token after each token."""

    class Model(torch.nn.Module):
        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.from_numpy(table)[input_ids])

    rows = [list(range(5, 25)), list(range(30, 39))]
    lost = [np.log(np.exp(table[now]).sum()) - table[now, after] for row in rows for now, after in pairwise(row)]
    assert mean_loss(Model(), rows) == pytest.approx(np.mean(lost), rel=1e-5)
    assert mean_loss(Model(), []) is None
