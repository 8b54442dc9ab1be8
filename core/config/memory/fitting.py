"""What makes a training fit: single edits with their price, and the fastest micro-batch for the same effective batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from core.config.deepspeed import zero_of_choice
from core.config.edits import set_method
from core.config.memory.budget import Budget, Verdict, make_budget
from core.config.memory.setup import Attention, Engine, Setup, Start, read_setup
from core.config.source import ConfigSource
from core.messages import Message, message

Edit = Callable[[ConfigSource], ConfigSource]
_SHORTEST: Final = 256
_SMALLEST_RANK: Final = 8
_RECOMPUTING: Final = 4 / 3
"""Work of a step with checkpointing over one without: the forward pass is done twice (Chen et al. 2016)."""
_HALF_SPEED_TOKENS: Final = 512
"""Tokens of a micro-batch at which a large GPU reaches half of its speed: a guess, only used to order the choices."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to need less. `budget.options.<code>` says what it does, `budget.prices.<code>` what it costs."""

    code: str
    what: Message
    price: Message
    budget: Budget
    """As it would be."""
    edit: Edit | None = None
    """Of the config."""
    deepspeed: str | None = None
    """Or another choice on the launch page."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The fastest way that fits, and the edit that makes it so."""

    batch_size: int
    accumulation: int
    is_checkpointing: bool
    budget: Budget
    speed: float
    """Against the config as it is; 1.0 is as fast. From arithmetic, not measured."""
    edit: Edit


def options(budget: Budget, free_bytes: int, *, has_bitsandbytes: bool = True) -> list[Option]:
    """Every single change that needs less, those first that make it fit, the cheapest first among them."""
    found = [option for option in _options(budget, has_bitsandbytes=has_bitsandbytes) if _saves(budget, option)]
    return sorted(found, key=lambda option: option.budget.verdict(free_bytes) is Verdict.TOO_LARGE)


def saved_bytes(budget: Budget, option: Option) -> int:
    return budget.needed_bytes - option.budget.needed_bytes


def _saves(budget: Budget, option: Option) -> bool:
    return saved_bytes(budget, option) > budget.needed_bytes // 100


def _options(budget: Budget, *, has_bitsandbytes: bool) -> Iterator[Option]:
    setup = budget.setup
    make = partial(_option, budget)
    if setup.attention is Attention.EAGER:
        edit = partial(_set, path="model.llm.attn_implementation", value="sdpa")
        yield make("attention", replace(setup, attention=Attention.SDPA), edit)
    if setup.batch_size > 1:
        smaller = replace(setup, batch_size=1, accumulation=setup.accumulation * setup.batch_size)
        edit = partial(_set_batch, batch=1, accumulation=smaller.accumulation)
        yield make("batch", smaller, edit, batch=1, accumulation=smaller.accumulation)
    if not setup.is_checkpointing:
        edit = partial(_set, path="model.use_activation_checkpointing", value=True)
        yield make("checkpointing", replace(setup, is_checkpointing=True), edit)
    yield from _deepspeed_options(budget)
    if setup.method == "lora" and has_bitsandbytes and setup.stage != 3:
        packed = replace(setup, method="qlora", bits=4, is_double_quantized=True)
        yield make("qlora", packed, partial(set_method, method="qlora"))
    if setup.method == "full":
        yield make("lora", replace(setup, method="lora", rank=64, dropout=0.1), partial(set_method, method="lora"))
    if setup.is_adapted and setup.rank > _SMALLEST_RANK:
        rank = max(_SMALLEST_RANK, setup.rank // 4)
        yield make("rank", replace(setup, rank=rank), partial(_set, path="model.lora.r", value=rank), rank=rank)
    if setup.length > _SHORTEST:
        length = setup.length // 2
        edit = partial(_set, path="max_length", value=length)
        yield make("length", replace(setup, length=length), edit, length=length)


def _deepspeed_options(budget: Budget) -> Iterator[Option]:
    """ZeRO on one GPU pays only where it keeps frozen weights in 16 bits, on several where it shares what each holds."""
    setup = budget.setup
    stages = {"deepspeed_zero2": (2, False), "deepspeed_zero3": (3, False), "deepspeed_zero3_offload": (3, True)}
    for name, (stage, is_offloaded) in stages.items():
        is_larger = (stage, is_offloaded) > (setup.stage, setup.is_offloaded)
        if not is_larger or (stage == 3 and (setup.method == "qlora" or (setup.world_size == 1 and not is_offloaded))):
            continue
        # XTuner's settings have DeepSpeed's own buckets, and offload everything they can.
        zero = zero_of_choice(name)
        other = replace(
            setup, engine=Engine.DEEPSPEED, stage=stage, is_offloaded=is_offloaded, offloads_parameters=zero.offloads_parameters,
            bucket_elements=zero.bucket_elements, overlaps=zero.overlaps, live_elements=zero.live_elements,
        )  # fmt: skip
        code = "offload" if is_offloaded else f"zero{stage}"
        changed = _budget(budget, other)
        yield Option(code, message(f"budget.options.{code}"), message(f"budget.prices.{code}"), changed, deepspeed=name)


def _option(budget: Budget, code: str, setup: Setup, edit: Edit, **params: object) -> Option:
    what, price = message(f"budget.options.{code}", **params), message(f"budget.prices.{code}", **params)
    return Option(code, what, price, _budget(budget, setup), edit)


def _budget(budget: Budget, setup: Setup) -> Budget:
    return make_budget(budget.shape, setup, free_bytes=budget.free_bytes, correction=budget.correction)


def fit(budget: Budget, free_bytes: int) -> Fit | None:
    """The fastest micro-batch, accumulation and checkpointing with the same effective batch that fit; None if none does.

    A choice that fits for sure is taken before one that fits if the allocator's cache stays small.
    """
    setup = budget.setup
    whole = setup.batch_size * setup.accumulation
    choices = [
        _choice(budget, batch, whole // batch, is_checkpointing)
        for batch in range(1, whole + 1)
        if whole % batch == 0 and whole // batch % setup.accumulation_step == 0
        for is_checkpointing in (False, True)
    ]
    for accepted in (Verdict.FITS, Verdict.TIGHT):
        fitting = [choice for choice in choices if choice.budget.verdict(free_bytes) is accepted]
        if fitting:
            return max(fitting, key=lambda choice: (choice.speed, -choice.batch_size))
    return None


def _choice(budget: Budget, batch: int, accumulation: int, is_checkpointing: bool) -> Fit:
    setup = replace(budget.setup, batch_size=batch, accumulation=accumulation, is_checkpointing=is_checkpointing)
    edit = partial(_set_fit, batch=batch, accumulation=accumulation, is_checkpointing=is_checkpointing)
    speed = _cost(budget.setup) / _cost(setup)
    return Fit(batch, accumulation, is_checkpointing, _budget(budget, setup), speed, edit)


def _cost(setup: Setup) -> float:
    """Time of a token, in units of a token's without recomputation in a large micro-batch."""
    return (_RECOMPUTING if setup.is_checkpointing else 1.0) * (1 + _HALF_SPEED_TOKENS / setup.tokens)


def _set(source: ConfigSource, *, path: str, value: object) -> ConfigSource:
    return source.set(path, value)


def _set_batch(source: ConfigSource, *, batch: int, accumulation: int) -> ConfigSource:
    """The variables of PART 1; `accumulative_counts *= sequence_parallel_size` below them goes on to hold."""
    step = read_setup(source, Start()).accumulation_step
    return source.set("batch_size", batch).set("accumulative_counts", max(1, accumulation // step))


def _set_fit(source: ConfigSource, *, batch: int, accumulation: int, is_checkpointing: bool) -> ConfigSource:
    source = _set_batch(source, batch=batch, accumulation=accumulation)
    path = "model.use_activation_checkpointing"
    if source.get(path, True) is is_checkpointing:
        return source
    return source.set(path, is_checkpointing)
