"""Weights out of DeepSpeed folders that real ranks wrote, against DeepSpeed's own gathering."""

import shutil
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints.inspect import inspect_checkpoint
from core.checkpoints.tensors import narrow, widen
from core.checkpoints.weights import Checkpoint, open_checkpoint
from core.errors import InputError
from tests.core.checkpoints.test_reader import write_zip
from tests.core.checkpoints.test_reshape import Trainer

RANKS = 3
FOLDERS: dict[str, dict[str, Any]] = {
    "zero1 bf16": dict(stage=1, dtype="bf16"),
    "zero2": dict(stage=2),
    "zero2 bf16 two groups": dict(stage=2, dtype="bf16", groups=2),
    "zero2 lora": dict(stage=2, lora=True, exclude_frozen=True),
    "zero3": dict(stage=3),
    "zero3 bf16 sub-groups": dict(stage=3, dtype="bf16", groups=2, sub_group_size=50),
    "zero3 lora": dict(stage=3, lora=True, exclude_frozen=True),
    "zero3 bf16 lora, frozen saved": dict(stage=3, dtype="bf16", lora=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three ranks: no size is a multiple of it, so every partition is padded."""
    home = tmp_path_factory.mktemp("zero")
    found = {name: home / name / "iter_2.pth" for name in FOLDERS}
    trainings = [
        {**options, "steps": 2, "save_at": 2, "save_to": str(found[name])} for name, options in FOLDERS.items()
    ]
    with closing(Trainer(home)) as trainer:
        trainer.run(RANKS, trainings)
    return found


def gathered(folder: Path) -> dict[str, np.ndarray]:
    """What DeepSpeed's zero_to_fp32 gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return {name: value.detach().float().numpy() for name, value in state.items()}


@pytest.mark.engine
@pytest.mark.parametrize("name", FOLDERS)
def test_masters_are_what_deepspeed_gathers(name: str, folders: dict[str, Path]) -> None:
    opened = open_checkpoint(folders[name])
    expected = gathered(folders[name])
    assert (opened.stage, opened.world_size, opened.missing_ranks) == (FOLDERS[name]["stage"], RANKS, ())
    found = {**opened.weights, **opened.masters}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(widen(found[key].read(), found[key].dtype), value), key


@pytest.mark.engine
@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_those_the_model_computed_with(name: str, folders: dict[str, Path]) -> None:
    """In bf16 the weights are the masters rounded; nothing of the trained ones is missing."""
    opened = open_checkpoint(folders[name])
    dtype = "BF16" if FOLDERS[name].get("dtype") == "bf16" else "F32"
    assert opened.masters
    for key, master in opened.masters.items():
        tensor = opened.weights[key]
        assert tensor.dtype == dtype
        assert np.array_equal(tensor.read(), narrow(master.read(), dtype)), key


@pytest.mark.engine
def test_inspect_counts_what_is_there(folders: dict[str, Path]) -> None:
    card = inspect_checkpoint(folders["zero3 bf16 lora, frozen saved"])
    assert (card.is_complete, card.stage, card.world_size, card.dtype) == (True, 3, RANKS, "BF16")
    assert card.is_adapter
    assert card.has_optimizer
    sizes = [value.size for value in gathered(card.path).values()]
    assert card.parameters == sum(sizes)


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / "iter_2.pth"))


def code_of(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    return caught.value.code


@pytest.mark.engine
def test_lost_rank_of_zero2_leaves_the_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("zero2 bf16 two groups")
    next(folder.glob("*rank_1_*optim*")).unlink()
    opened: Checkpoint = open_checkpoint(folder)
    assert opened.missing_ranks == (1,)
    assert opened.weights
    assert not opened.masters
    assert not inspect_checkpoint(folder).is_complete


@pytest.mark.engine
@pytest.mark.parametrize("which", ["optim", "model"])
def test_lost_rank_of_zero3_is_an_error(which: str, copy: Callable[[str], Path]) -> None:
    folder = copy("zero3")
    next(folder.glob(f"*rank_2_*{which}*")).unlink()
    assert code_of(folder) == "checkpoints.cut"


@pytest.mark.engine
def test_truncated_rank_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("zero3")
    file = next(folder.glob("*rank_1_*optim*"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert (caught.value.code, caught.value.params["path"]) == ("checkpoints.truncated", str(file))


@pytest.mark.engine
def test_rank_files_of_another_training_are_refused(copy: Callable[[str], Path], folders: dict[str, Path]) -> None:
    """The flat vectors are shorter than the shapes say."""
    folder = copy("zero3")
    for rank in range(RANKS):
        name = next(folder.glob(f"*rank_{rank}_*optim*")).name
        other = next(folders["zero3 lora"].glob(f"*rank_{rank}_*optim*"))
        shutil.copyfile(other, folder / name)
    assert code_of(folder) == "checkpoints.mixed_files"


def test_tensor_parallel_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "iter_2.pth"
    folder.mkdir()
    (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"")
    assert code_of(folder) == "checkpoints.tensor_parallel"


def test_folder_without_states_and_file_without_weights(tmp_path: Path) -> None:
    (tmp_path / "iter_2.pth").mkdir()
    assert code_of(tmp_path / "iter_2.pth") == "checkpoints.not_deepspeed"
    assert code_of(write_zip(tmp_path / "file.pth", b"\x80\x02}.")) == "checkpoints.no_weights"
    assert code_of(write_zip(tmp_path / "list.pth", b"\x80\x02].")) == "checkpoints.no_weights"
