"""Reshaping against real DeepSpeed on CPU: what was saved by N ranks, or without it, goes on, on M, as if nothing had happened."""

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoints.counters import check_counters, rescale_counters, rescaled_accumulation
from core.checkpoints.plain_layout import numbered
from core.checkpoints.reshape import plan_reshape, reshape
from core.checkpoints.zero_layout import ZeroFolder
from core.errors import ConflictError, InputError
from core.runs.job import SilentProgress
from core.xtuner.command import free_port

TRAINING = Path(__file__).parent / "zero_training.py"
STEPS, SAVE_AT = 8, 4


@dataclass
class Case:
    """One training: saved on the first number of ranks, carried over to the others one after the other."""

    ranks: list[int]
    options: dict[str, Any]
    stages: list[int | None] = field(default_factory=list)
    """ZeRO stage to change to, by hop."""
    whole: list[float] = field(default_factory=list)
    """Losses of the uninterrupted run."""
    hops: list[dict[str, Any]] = field(default_factory=list)
    """What `reshape` said, and the losses after it."""


CASES = {
    "zero2 1-2-1": Case([1, 2, 1], dict(stage=2)),
    "zero3 1-2-1": Case([1, 2, 1], dict(stage=3)),
    "zero1 two groups 2-3": Case([2, 3], dict(stage=1, groups=2)),
    "zero3 two groups and sub-groups 2-3": Case([2, 3], dict(stage=3, groups=2, sub_group_size=50)),
    "zero3 lora 4-2": Case([4, 2], dict(stage=3, lora=True, exclude_frozen=True)),
    "zero3 lora frozen saved 2-1": Case([2, 1], dict(stage=3, lora=True)),
    "zero2 lora offload 2-1": Case([2, 1], dict(stage=2, lora=True, offload=True)),
    "zero2 to zero3 to zero2": Case([2, 1, 2], dict(stage=2), [3, 2]),
    "plain to zero2 to plain": Case([1, 2, 1], dict(stage=0), [2, 0]),
    "plain lora to zero1 to plain": Case([1, 2, 1], dict(stage=0, lora=True, exclude_frozen=True), [1, 0]),
    "plain to zero3 to plain": Case([1, 2, 1], dict(stage=0), [3, 0]),
    "bf16 zero1 there and back": Case([2, 1, 2], dict(stage=1, dtype="bf16")),
    "bf16 there and back": Case([2, 3, 2], dict(stage=3, dtype="bf16", lora=True, exclude_frozen=True)),
}


class Trainer:
    """The server of `zero_training.py`: imports once, forks ranks for each order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._errors = open(folder / "trainer.log", "w+", encoding="utf-8")  # noqa: SIM115 - closed in close()
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
        self._process = subprocess.Popen(
            [sys.executable, str(TRAINING)], env={**os.environ, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1,
        )  # fmt: skip

    def run(self, ranks: int, trainings: list[dict[str, Any]]) -> list[list[float]]:
        """Losses of each of `trainings`, done one after the other by `ranks` gloo processes."""
        results = [self._folder / f"losses_{ranks}_{number}.json" for number in range(len(trainings))]
        settings = [
            {"steps": STEPS, "dtype": "fp32", **training, "result": str(result)}
            for training, result in zip(trainings, results, strict=True)
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"ranks": ranks, "port": free_port(), "trainings": settings}) + "\n")
        codes = json.loads(self._process.stdout.readline() or "null")
        assert codes == [0] * ranks, (codes, self._log())
        return [json.loads(result.read_text(encoding="utf-8")) for result in results]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=240)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def _log(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-3000:]


def run_by_ranks(trainer: Trainer, wanted: list[tuple[str, int, dict[str, Any]]]) -> dict[str, list[float]]:
    """Losses by case: the trainings that need the same number of ranks share one start."""
    losses: dict[str, list[float]] = {}
    for ranks in sorted({ranks for _, ranks, _ in wanted}):
        chosen = [(name, options) for name, needed, options in wanted if needed == ranks]
        found = trainer.run(ranks, [options for _, options in chosen])
        losses |= {name: values for (name, _), values in zip(chosen, found, strict=True)}
    return losses


def carry_over(trainer: Trainer, folder: Path, hop: int) -> None:
    """Reshape every case that has such a hop, and train it on to the end."""
    wanted = []
    for name, case in CASES.items():
        if len(case.ranks) <= hop:
            continue
        source = case.hops[-1]["target"] if case.hops else str(folder / name / "iter_4.pth")
        target = folder / name / f"hop_{hop}" / "iter_4.pth"
        stage = case.stages[hop - 1] if case.stages else None
        case.hops.append(reshape(source, str(target), case.ranks[hop], stage=stage, progress=SilentProgress()))
        options = {**case.options, "resume": str(target), "stage": case.hops[-1]["to_stage"]}
        wanted.append((name, case.ranks[hop], options))
    for name, values in run_by_ranks(trainer, wanted).items():
        CASES[name].hops[-1]["losses"] = values


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("reshape")
    first = [
        (name, case.ranks[0], {**case.options, "save_at": SAVE_AT, "save_to": str(folder / name / "iter_4.pth")})
        for name, case in CASES.items()
    ]
    with closing(Trainer(folder)) as trainer:
        for name, values in run_by_ranks(trainer, first).items():
            CASES[name].whole = values
        for hop in (1, 2):
            carry_over(trainer, folder, hop)
    return CASES


def largest_difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second)
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_if_nothing_had_happened(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    limit = 1e-6 if case.options.get("dtype", "fp32") == "fp32" else 2e-2
    for hop in case.hops:
        assert hop["tensors_verified"] > 0
        assert largest_difference(case.whole[SAVE_AT:], hop["losses"]) < limit


@pytest.mark.engine
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.ranks[0] == case.ranks[-1] and not case.stages]
)
def test_there_and_back_is_bit_for_bit(cases: dict[str, Case], name: str) -> None:
    """Same partitions, and the same losses to the last bit as the run that was never interrupted."""
    case = cases[name]
    assert case.hops[0]["digest"] == case.hops[-1]["digest"]
    assert case.hops[-1]["losses"] == case.whole[SAVE_AT:]
    target = Path(case.hops[-1]["target"])
    before, after = ZeroFolder(target.parents[1] / "iter_4.pth"), ZeroFolder(target)
    name_of_masters = "fp32_flat_groups" if before.stage == 3 else "single_partition_of_fp32_groups"
    for old, new in zip(before.layouts, after.layouts, strict=True):
        for a, b in zip(old[name_of_masters], new[name_of_masters], strict=True):
            assert a.numel == b.numel  # equal in content by digest; padding is nobody's


@pytest.mark.engine
@pytest.mark.parametrize("name", ["plain to zero2 to plain", "plain lora to zero1 to plain"])
def test_without_deepspeed_and_back_is_bit_for_bit(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    """Through a folder of two ranks, and through ZeRO-3 of three, the same file comes back; frozen parameters keep their numbers."""
    from tests.core.checkpoints.zero_training import Network

    case = cases[name]
    assert case.hops[-1]["losses"] == case.whole[SAVE_AT:]
    saved = Path(case.hops[0]["source"])
    reshape(str(saved), str(tmp_path / "zero3"), 3, stage=3, progress=SilentProgress())
    reshape(str(tmp_path / "zero3"), str(tmp_path / "back.pth"), 1, stage=0, progress=SilentProgress())
    before = torch.load(saved, weights_only=False)
    for file in (Path(case.hops[-1]["target"]), tmp_path / "back.pth"):
        after = torch.load(file, weights_only=False)
        assert list(after["state_dict"]) == list(before["state_dict"])
        assert all(torch.equal(value, after["state_dict"][key]) for key, value in before["state_dict"].items())
        every = [name for name, _ in Network(bool(case.options.get("lora"))).named_parameters()]
        optimizer = numbered(after["optimizer"], every)
        assert optimizer["param_groups"] == before["optimizer"]["param_groups"]
        assert optimizer["state"].keys() == before["optimizer"]["state"].keys()
        for number, state in before["optimizer"]["state"].items():
            assert all(torch.equal(value, optimizer["state"][number][key]) for key, value in state.items())
        steps = [state["step"].data_ptr() for state in optimizer["state"].values()]
        assert len(set(steps)) == len(steps), "torch counts in place: a shared step would run ahead"


@pytest.mark.engine
def test_what_is_cut_lost_or_taken_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    target = Path(cases["bf16 there and back"].hops[0]["target"])
    check_refusals(target.parents[1] / "iter_4.pth", target, tmp_path)


def check_refusals(saved: Path, taken: Path, tmp_path: Path) -> None:
    """What is cut, lost, taken or impossible is refused before anything is written, and the source stays as it was."""
    files = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(ConflictError):
        reshape(str(saved), str(taken), 1, progress=SilentProgress())
    with pytest.raises(InputError, match="bad_world_size"):
        plan_reshape(saved, 0)
    broken = tmp_path / "broken"
    for name, code in (("zero_pp_rank_0", "missing_rank"), ("zero_pp_rank_1", "incomplete")):
        broken.mkdir()
        for file in saved.iterdir():
            if not (name in file.name and "optim" in file.name):
                (broken / file.name).write_bytes(file.read_bytes())
        with pytest.raises(InputError, match=code):
            plan_reshape(broken, 1)
        for file in broken.iterdir():
            file.unlink()
        broken.rmdir()
    broken.mkdir()
    for file in saved.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if "optim" in file.name else content)
    with pytest.raises(InputError, match="unreadable"):
        reshape(str(broken), str(tmp_path / "c"), 1, progress=SilentProgress())
    assert not (tmp_path / "c").exists()
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == files


def test_what_is_no_zero_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not_zero"):
        plan_reshape(tmp_path, 2)


def test_the_global_batch_is_kept_or_refused() -> None:
    assert rescaled_accumulation(4, 1, 2) == 2
    assert rescaled_accumulation(2, 2, 1) == 4
    with pytest.raises(InputError, match="uneven_accumulation"):
        rescaled_accumulation(3, 1, 2)
    with pytest.raises(InputError, match="inside_accumulation"):
        check_counters(500, 1, 2, 16)
    with pytest.raises(InputError, match="uneven_iteration"):
        check_counters(5, 1, 2, None)


def test_counters_of_the_loop_move_to_the_same_optimizer_step() -> None:
    warmup = {"by_epoch": False, "begin": 0, "end": 20, "_global_step": 160, "last_step": 19, "total_iters": 19}
    cosine = {"by_epoch": False, "begin": 20, "end": 368, "_global_step": 160, "last_step": 140, "T_max": 348}
    states: dict[str, Any] = {"meta": {"iter": 160, "seed": 1}, "param_schedulers": [warmup, cosine]}
    original = json.loads(json.dumps(states))
    rescale_counters(states, 1, 2)
    assert states["meta"] == {"iter": 80, "seed": 1}
    linear, curve = states["param_schedulers"]
    assert (linear["begin"], linear["end"], linear["_global_step"]) == (0, 10, 80)
    assert (curve["begin"], curve["end"], curve["T_max"], curve["_global_step"]) == (10, 184, 174, 80)
    assert curve["last_step"] == 70.5, "half a micro-step: test_counters.py says why"
    rescale_counters(states, 2, 1)
    assert states["param_schedulers"][1] == original["param_schedulers"][1]
