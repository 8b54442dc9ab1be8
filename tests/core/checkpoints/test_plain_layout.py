"""Which optimizer state belongs to which weight of a plain checkpoint, and what cannot be told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoints.plain_layout import NAMES, PlainFile, numbered
from core.errors import InputError


def write(path: Path, network: torch.nn.Module, names: list[str] | None = None, **changes: Any) -> Path:
    """What mmengine saves after a step of AdamW over all parameters: the weights `names`, or all."""
    optimizer = torch.optim.AdamW(network.parameters())
    sum(parameter.sum() for parameter in network.parameters() if parameter.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    weights = {name: value for name, value in network.state_dict().items() if names is None or name in names}
    torch.save({"state_dict": weights, "optimizer": optimizer.state_dict(), "meta": {"iter": 4}, **changes}, path)
    return path


def code_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        PlainFile(path, 1)
    return caught.value.code


class Tied(torch.nn.Module):
    """Input and output embeddings are one tensor, so the model has one parameter less than names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_one_parameter(tmp_path: Path) -> None:
    plain = PlainFile(write(tmp_path / "iter_4.pth", Tied()), 1)
    assert [parameter.name for parameter in plain.parameters] == ["embed.weight", "norm.weight", "norm.bias"]
    assert plain.keys == ["fp32", "exp_avg", "exp_avg_sq"]
    assert plain.model_states["shared_params"] == {"head.weight": "embed.weight"}
    assert plain.model_states["global_steps"] == 1


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    assert code_of(write(tmp_path / "less.pth", network, ["0.weight"])) == "reshape.unnamed_state"
    bare = tmp_path / "bare.pth"
    torch.save({"state_dict": network.state_dict(), "meta": {}}, bare)
    assert code_of(bare) == "reshape.no_optimizer"
    empty = {"state": {}, "param_groups": [{"params": [0]}]}
    assert code_of(write(tmp_path / "empty.pth", network, optimizer=empty)) == "reshape.frozen_group"
    state = {n: {"exp_avg": torch.zeros(p.shape)} for n, p in enumerate(network.parameters())}
    groups = [{"params": [0, 1, 2, 3], "lr": 1.0}]
    eight = {**state, 0: {"exp_avg": torch.zeros(9, dtype=torch.uint8)}}
    eight_bit = {"state": eight, "param_groups": groups}
    assert code_of(write(tmp_path / "eight.pth", network, optimizer=eight_bit)) == "reshape.unknown_state"
    steps = {"state": {n: {**s, "step": torch.tensor(float(n))} for n, s in state.items()}, "param_groups": groups}
    assert code_of(write(tmp_path / "steps.pth", network, optimizer=steps)) == "reshape.uneven_steps"


def test_weights_trained_beside_an_adapter_are_refused(tmp_path: Path) -> None:
    layers = {"q.lora_A": torch.nn.Linear(3, 2), "q.lora_B": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 3)}
    network = torch.nn.Module()
    for name, layer in layers.items():
        network.add_module(name.replace(".", "_"), layer)
    path = write(tmp_path / "both.pth", network)
    content = torch.load(path)
    content["state_dict"] = {name.replace("_lora", ".lora"): v for name, v in content["state_dict"].items()}
    torch.save(content, path)
    assert code_of(path) == "reshape.beside_adapter"


def test_names_find_their_numbers_among_frozen_parameters() -> None:
    group = {"lr": 1.0, "params": [0, 1], NAMES: ["a.lora", "b.lora"]}
    found = numbered({"state": {0: "A", 1: "B"}, "param_groups": [group]}, ["a.base", "a.lora", "b.base", "b.lora"])
    assert found == {"state": {1: "A", 3: "B"}, "param_groups": [{"lr": 1.0, "params": [0, 1, 2, 3]}]}
    assert numbered(found, []) is found
