"""Several adapters in one model: peft's add_weighted_adapter is the oracle."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints.combination import SUM, combine_adapters, deliver_combination, start_combination
from core.checkpoints.deliverables import list_deliverables
from core.checkpoints.shards import read_shard
from core.checkpoints.verify import verify_merge
from core.errors import ConflictError, InputError
from core.project import open_project
from core.runs.job import SilentProgress
from tests.core.checkpoints.adapters import (
    make_adapter,
    one_torch_thread,
    peft_merge,
    peft_model,
    read_model,
    steps_apart,
)
from tests.core.checkpoints.crafted import write_adapter, write_adapter_tensors
from tests.models import write_tiny_llama

pytestmark = pytest.mark.engine
WEIGHTS = [0.7, -0.4, 1.5]


@pytest.fixture(scope="module", autouse=True)
def torch_threads() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters: one with its own alpha pattern, one on other modules."""
    folder = tmp_path_factory.mktemp("combination")
    base = write_tiny_llama(folder / "base", dtype="bfloat16", shards=2)
    make_adapter(base, folder / "a", seed=1, alpha_pattern={"q_proj": 3})
    make_adapter(base, folder / "b", seed=2, target_modules=["q_proj", "lm_head"], use_rslora=True)
    make_adapter(base, folder / "c", seed=3, target_modules=["q_proj", "k_proj"])
    make_adapter(base, folder / "one", seed=4, target_modules=["q_proj"], layers_to_transform=[0])
    make_adapter(base, folder / "two", seed=5, target_modules=["q_proj"], layers_to_transform=[0])
    write_adapter(folder / "other rank", base, rank=2)
    write_adapter_tensors(folder / "saved whole", {"base_model.model.lm_head.weight": np.ones((512, 64), np.float32)})
    return folder


def peft_s_own(
    home: Path, names: list[str], weights: list[float], method: str, density: float
) -> dict[str, np.ndarray]:
    """The tensors of the adapter that peft combines, by their names in a PEFT file."""
    import torch
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(home / "base", home / names[0])
        for name in names[1:]:
            model.load_adapter(str(home / name), name)
        combine = model.base_model._generalized_task_arithmetic_weighted_adapter

        def seeded(*arguments: Any) -> Any:
            torch.manual_seed(0)  # only here: a new adapter's first values are random too
            return combine(*arguments)

        model.base_model._generalized_task_arithmetic_weighted_adapter = seeded
        model.add_weighted_adapter(["default", *names[1:]], weights, "made", combination_type=method, density=density)
        state = get_peft_model_state_dict(model, adapter_name="made", save_embedding_layers=False)
    return {name: value.float().numpy() for name, value in state.items()}


@pytest.mark.parametrize(
    ("method", "names", "weights"),
    [
        ("ties", ["a", "b", "c"], WEIGHTS),
        ("magnitude_prune", ["a", "b", "c"], WEIGHTS),
        # What DARE drops depends on the order of the modules, which is peft's own: with one module there is only one order.
        ("dare_linear", ["one", "two"], [0.6, 1.2]),
        ("dare_ties", ["one", "two"], [0.6, -1.2]),
    ],
)
def test_a_combined_adapter_is_peft_s(
    method: str, names: list[str], weights: list[float], home: Path, tmp_path: Path
) -> None:
    folders = [str(home / name) for name in names]
    combine_adapters(folders, weights, str(tmp_path / "made"), method=method, density=0.3, progress=SilentProgress())
    found = {name: t.read() for name, t in read_shard(tmp_path / "made/adapter_model.safetensors").tensors.items()}
    expected = peft_s_own(home, names, weights, method, 0.3)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
    assert any(np.mean(values == 0) > 0.1 for values in found.values())


def test_a_delivered_combination_is_merged_checked_and_says_what_it_came_from(home: Path, tmp_path: Path) -> None:
    project = open_project(tmp_path)
    folders = [str(home / name) for name in "ac"]
    options: dict[str, Any] = dict(method="ties", density=0.5, verify=False, progress=SilentProgress())
    made = deliver_combination(str(tmp_path), folders, [1.0, 0.5], "both", **options)
    assert verify_merge(made["model"], method="layers", progress=SilentProgress())["passed"]
    assert steps_apart(read_model(project.final_model / "both"), peft_merge(home / "base", Path(made["adapter"]))) <= 1
    found = {item.path.parent.name: item for item in list_deliverables(project)}
    assert found["huggingface"].sources == ("a", "c")
    assert found["final_model"].sources == ("both",)
    assert (found["huggingface"].run, found["final_model"].run) == (None, None)
    recorded = json.loads((project.huggingface / "both/danlu.json").read_text())["combined"]
    assert recorded == {"method": "ties", "density": 0.5, "seed": 0}


@pytest.mark.parametrize(
    ("names", "code"),
    [(["a", "other rank"], "checkpoints.ranks_differ"), (["a", "saved whole"], "checkpoints.cannot_combine")],
)
def test_what_peft_cannot_combine_is_refused(names: list[str], code: str, home: Path, tmp_path: Path) -> None:
    folders = [str(home / name) for name in names]
    with pytest.raises(InputError) as caught:
        combine_adapters(
            folders, [1.0, 1.0], str(tmp_path / "x"), method="ties", density=0.5, progress=SilentProgress()
        )
    assert caught.value.code == code
    assert not list(tmp_path.iterdir())


def test_a_start_is_refused_before_a_job_is_made(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    folders = [project.huggingface / name for name in "ab"]
    (project.final_model / "taken").mkdir(parents=True)

    def refused(name: str = "new", weights: list[float] | None = None, **options: Any) -> str:
        choices: dict[str, Any] = {"method": SUM, "density": 0.5, "verify": False, **options}
        with pytest.raises((InputError, ConflictError)) as caught:
            start_combination(project, folders, weights or [1.0, 1.0], name, **choices)
        return caught.value.code

    assert refused(method="svd") == refused(density=1.0) == "checkpoints.bad_method"
    assert refused(weights=[1.0]) == "checkpoints.too_few_adapters"
    assert {refused(name) for name in ("", "../x", ".x", "a b", "a/b")} == {"checkpoints.bad_name"}
    assert refused("taken") == "files.exists"
    folders[0] = tmp_path / "elsewhere"
    assert refused() == "files.outside"
