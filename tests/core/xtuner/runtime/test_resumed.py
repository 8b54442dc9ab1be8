"""What a plain checkpoint made from a DeepSpeed one names is numbered before the optimizer reads it."""

from types import SimpleNamespace
from typing import Any

import pytest

from core.checkpoints.plain_layout import NAMES

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def test_an_optimizer_takes_the_states_of_trained_parameters_by_name() -> None:
    """Frozen parameters have numbers too; without the hook torch refuses the state, and with it each finds its own."""
    import torch

    from core.xtuner.runtime.resumed import NumberHook

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    group = {key: value for key, value in optimizer.state_dict()["param_groups"][0].items() if key != "params"}
    names = ["1.weight", "1.bias"]
    shapes = {"1.weight": (2, 3), "1.bias": (2,)}
    state = {
        number: {"step": torch.tensor(4.0), "exp_avg": torch.full(shapes[name], number + 1.0), "exp_avg_sq": torch.ones(shapes[name])}
        for number, name in enumerate(names)
    }  # fmt: skip
    checkpoint: dict[str, Any] = {
        "optimizer": {"state": state, "param_groups": [{**group, "params": [0, 1], NAMES: names}]}
    }
    NumberHook().after_load_checkpoint(SimpleNamespace(model=model), checkpoint)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert optimizer.state[model[1].weight]["exp_avg"].tolist() == [[1.0] * 3] * 2
    assert optimizer.state[model[1].bias]["exp_avg"].tolist() == [2.0, 2.0]
    assert NAMES not in optimizer.param_groups[0], "what is saved next counts as mmengine does"
