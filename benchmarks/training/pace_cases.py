"""Cases of the `multigpu` benchmark that are about speed and memory: one GPU, then two with each way to share the work.

The runs of a batch import side by side and train one after the other, each alone on the machine (see `held_entry`).
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from benchmarks.training import ranks
from benchmarks.training.case import make_model_folder
from benchmarks.training.memory_case import shape_json
from benchmarks.training.ranks import Outcome, Setting
from core.config.memory.budget import make_budget
from core.config.memory.setup import Start, read_setup
from core.config.memory.shape import shape_of
from core.config.source import ConfigSource
from core.gpu import devices
from core.runs.control import request_stop
from core.runs.directory import RunDirectory
from core.xtuner.runtime.speed.parts import Wish

_AT_ONCE: Final = 4
_READY_SECONDS: Final = 90.0
_CASE_SECONDS: Final = 100.0
Note = Callable[..., None]


@dataclass(frozen=True, slots=True)
class PaceCase:
    """One run: what it trains, on how many GPUs, and how they share the work."""

    method: str
    speed: str
    count: int
    deepspeed: str | None = None
    shape: str | None = None
    """Another one than the benchmark's."""

    @property
    def name(self) -> str:
        way = self.deepspeed.removeprefix("deepspeed_") if self.deepspeed else "ddp"
        side = "stock" if self.speed == "off" else "fast"
        return "_".join([*self._kind(), side, str(self.count), *([way] if self.count > 1 else [])])

    @property
    def alone(self) -> str:
        """Name of the same on one GPU."""
        return "_".join([*self._kind(), "stock" if self.speed == "off" else "fast", "1"])

    def _kind(self) -> list[str]:
        return [*([self.shape] if self.shape else []), self.method]

    def setting(self, cards: tuple[str, ...], shape: str) -> Setting:
        steps = 5 if self.speed == "off" else 8
        sizes: dict[str, Any] = {"length": 64, "batches": 4} if shape == "tiny" else {}
        return Setting(
            name=self.name, gpus=cards[: self.count], ranks=self.count, shape=self.shape or shape, method=self.method,
            deepspeed=self.deepspeed, speed=self.speed, steps=steps, **sizes,
        )  # fmt: skip


_ZERO_1, _ZERO_2, _ZERO_3 = (f"deepspeed_zero{stage}" for stage in (1, 2, 3))
SPEED: Final = (
    PaceCase("lora", "off", 1),
    PaceCase("lora", "auto", 1),
    PaceCase("lora", "auto", 2),
    PaceCase("lora", "auto", 2, _ZERO_2),
    PaceCase("qlora", "off", 1),
    PaceCase("qlora", "auto", 1),
    PaceCase("qlora", "auto", 2),
    PaceCase("qlora", "auto", 2, _ZERO_2),
    PaceCase("lora", "auto", 2, _ZERO_1),
    PaceCase("lora", "off", 2),
    PaceCase("lora", "off", 2, _ZERO_2),
    PaceCase("lora", "off", 2, _ZERO_3),
)
"""The most telling first."""
FULL: Final = (PaceCase("full", "off", 2, _ZERO_3),)
LARGE: Final = (PaceCase("lora", "auto", 1, shape="7b"), PaceCase("lora", "auto", 2, shape="7b"))


def train_each(
    cases: tuple[PaceCase, ...], *, cards: tuple[str, ...], shape: str, home: Path, note: Note, left_seconds: Callable[[], float]
) -> list[str]:  # fmt: skip
    """Train the cases in turn and `note` their figures. Names of those that no longer fit into the time."""
    left_out: list[str] = []
    rates: dict[str, float] = {}
    for some in _batches(cases):
        if left_seconds() < 60:
            left_out += [case.name for case in some]
            continue
        held = [_Held.begin(case, cards, shape, home) for case in some]
        if any(run.needs_weights for run in held):
            ranks.in_child(ranks.SAVE_MODEL, str(held[0].model))
        for run in held:
            run.wait_until_ready()
        for run in held:
            if left_seconds() < 15:
                run.give_up()
                left_out.append(run.case.name)
                continue
            before = ranks.used_bytes()
            outcome = run.train()
            _note(run, outcome, rates, before, note)
    return left_out


def _batches(cases: tuple[PaceCase, ...]) -> Iterator[list[PaceCase]]:
    waiting = iter(cases)
    while some := list(islice(waiting, _AT_ONCE)):
        yield some


@dataclass(frozen=True, slots=True)
class _Held:
    """A run that has begun and waits for its turn."""

    case: PaceCase
    setting: Setting
    model: Path
    run: RunDirectory
    budget_gib: float

    @classmethod
    def begin(cls, case: PaceCase, cards: tuple[str, ...], shape: str, home: Path) -> "_Held":
        setting = case.setting(cards, shape)
        model = make_model_folder(setting.shape, Path(tempfile.gettempdir()) / f"danlu_bench_{setting.shape}")
        text = ranks.write_config(setting, model, home / setting.name)
        run = ranks.begin(setting, model, home, text=text, is_held=True)
        return cls(case, setting, model, run, _budget(setting, text))

    @property
    def needs_weights(self) -> bool:
        """Whether its loader reads them from the disk."""
        return self.setting.method == "qlora" or "zero3" in str(self.setting.deepspeed)

    def wait_until_ready(self) -> None:
        ranks.wait_until_ready(self.run, self.setting, seconds=_READY_SECONDS)

    def train(self) -> Outcome:
        ranks.let_go(self.run)
        return ranks.wait(self.run, self.setting, seconds=_CASE_SECONDS)

    def give_up(self) -> None:
        request_stop(self.run, "cancel")
        ranks.wait(self.run, self.setting, seconds=_CASE_SECONDS)


def _budget(setting: Setting, text: str) -> float:
    """Peak allocated that the app would expect for this run, GiB."""
    start = Start(world_size=setting.world_size, deepspeed=setting.deepspeed, wish=Wish.from_json(setting.speed))
    setup = read_setup(ConfigSource(text), start, model_type="internlm2")
    free = min((device.memory_total_bytes or 0 for device in devices()), default=0)
    budget = make_budget(shape_of(shape_json(setting.shape)), setup, free_bytes=free or None)
    return budget.allocated_bytes / 2**30


def _note(held: _Held, outcome: Outcome, rates: dict[str, float], before: list[int], note: Note) -> None:
    case, name = held.case, held.case.name
    if outcome.error:
        note(**{f"{name}_error": outcome.error})
    rate = outcome.tokens_per_second_per_rank()
    if not rate:
        return
    rates[name] = rate
    alone, peak = rates.get(case.alone), outcome.peak_allocated_gib
    figures: dict[str, float | int | str | None] = {
        f"{name}_tokens_per_second_per_gpu": round(rate),
        f"{name}_peak_gib": peak,
        f"{name}_budget_gib": round(held.budget_gib, 2),
        f"{name}_budget_off": round(abs(held.budget_gib / peak - 1), 3) if peak else None,
        f"{name}_left_mib": ranks.free_after(before),
    }
    if case.count > 1:
        nvml = [round(value / 2**30, 2) for value in outcome.per_card("memory_used_bytes")]
        figures |= {
            f"{name}_efficiency": round(rate / alone, 3) if alone else None,
            f"{name}_peak_nvml_gib": " / ".join(map(str, nvml)),
            f"{name}_utilization_percent": " / ".join(f"{v:.0f}" for v in outcome.per_card("utilization_percent")),
        }
    note(**figures)
