"""Counters of mmengine's training loop when the number of ranks changes: iteration, schedulers, data position.

An iteration is one micro-batch of one rank. With accumulation × ranks held constant, one optimizer step takes old/new times
as many iterations, so all of them scale by that (mmengine 0.10: `IterBasedTrainLoop`, `_ParamScheduler`). A run that gets
more epochs than planned has its schedule stretched: it is then where a run planned for them from the start would be.
"""

import math
from fractions import Fraction
from typing import Any

from core.errors import InputError


def rescaled_accumulation(accumulative_counts: int, old: int, new: int) -> int:
    """The accumulation that keeps the global batch on `new` ranks. Raises InputError if it is no whole number."""
    result = Fraction(accumulative_counts * old, new)
    if result.denominator != 1 or result < 1:
        raise InputError("reshape.uneven_accumulation", accumulative_counts=accumulative_counts, old=old, new=new)
    return int(result)


def check_counters(iteration: int, old: int, new: int, accumulative_counts: int | None) -> None:
    """Raises InputError if the iteration is not whole on `new` ranks, or lies inside an accumulation window.

    Partial gradients are not saved, so a checkpoint inside a window loses them even on the same number of ranks.
    """
    if accumulative_counts is not None:
        if iteration % accumulative_counts:
            raise InputError(
                "reshape.inside_accumulation", iteration=iteration, accumulative_counts=accumulative_counts
            )
        rescaled_accumulation(accumulative_counts, old, new)
    if iteration * old % new:
        raise InputError("reshape.uneven_iteration", iteration=iteration, old=old, new=new)


def rescale_counters(states: dict[str, Any], old: int, new: int, stretch: Fraction = Fraction(1)) -> None:
    """Scale the counters in `states` (a DeepSpeed model_states dict or a plain checkpoint) in place; nothing else is touched.

    `stretch`: epochs of the longer schedule to those it was planned for. What is changed is replaced, not mutated, so that
    memory-mapped or shared parts of the source stay as they are.
    """
    if (old == new and stretch == 1) or "meta" not in states:
        return
    iteration = states["meta"]["iter"] * old // new
    states["meta"] = {**states["meta"], "iter": iteration}
    schedulers = states.get("param_schedulers")
    if isinstance(schedulers, dict):
        states["param_schedulers"] = {
            name: [_scheduler(s, Fraction(old, new), stretch) for s in group] for name, group in schedulers.items()
        }
    elif schedulers:
        states["param_schedulers"] = [_scheduler(s, Fraction(old, new), stretch) for s in schedulers]
    hub = states.get("message_hub")
    if isinstance(hub, dict) and "keep_ckpt_ids" in hub.get("runtime_info", {}):
        # The new run keeps count of its own checkpoints; the one it begins with is the first of them.
        states["message_hub"] = {**hub, "runtime_info": {**hub["runtime_info"], "keep_ckpt_ids": [iteration]}}


def carry_counters(states: dict[str, Any], old: int, new: int, stretch: Fraction = Fraction(1)) -> list[float] | None:
    """As `rescale_counters`; returns the optimizer's learning rates there, None if they stay. Raises InputError."""
    rescale_counters(states, old, new, stretch)
    if old == new and stretch == 1:
        return None
    rates = learning_rates(states)
    if stretch != 1 and rates is None and states.get("param_schedulers"):
        raise InputError("reshape.unknown_schedule")
    return rates


def learning_rates(states: dict[str, Any]) -> list[float] | None:
    """The learning rate of each parameter group at the schedulers' place, in closed form.

    mmengine's schedulers compute each value from the one before, so when their place moves the optimizer must be given the value
    to go on from. None without schedulers, and for others than XTuner's (a linear warm-up, a cosine, or both).
    """
    found = states.get("param_schedulers")
    schedulers = [s for group in found.values() for s in group] if isinstance(found, dict) else list(found or [])
    schedulers = [s for s in schedulers if s.get("param_name", "lr") == "lr" and not s.get("by_epoch")]
    if not schedulers or not all({"T_max", "start_factor"} & scheduler.keys() for scheduler in schedulers):
        return None
    rates = [float(value) for value in schedulers[0]["base_values"]]
    for scheduler in schedulers:
        if scheduler["_global_step"] >= scheduler["begin"]:
            rates = [_rate(scheduler, rate) for rate in rates]
    return rates


def _rate(scheduler: dict[str, Any], base: float) -> float:
    if "T_max" in scheduler:
        lowest = scheduler["eta_min"] if scheduler.get("eta_min_ratio") is None else base * scheduler["eta_min_ratio"]
        share = scheduler["last_step"] / scheduler["T_max"]
        return float(lowest + (base - lowest) * (1 + math.cos(math.pi * share)) / 2)
    share = min(scheduler["last_step"] / scheduler["total_iters"], 1.0) if scheduler["total_iters"] > 0 else 1.0
    return float(base * (scheduler["start_factor"] + (scheduler["end_factor"] - scheduler["start_factor"]) * share))


def _scheduler(state: dict[str, Any], per_step: Fraction, stretch: Fraction) -> dict[str, Any]:
    """The state on the other number of ranks. Its place is a fraction where it must be, for the optimizer's sake:

    the optimizer moves at the last micro-step of a window, number a·k - 1 of windows of a. So that it sees the same rate there,
    micro-step i of old becomes r·(i + 1) - 1, and the place L of the next one r·(L - 1) + 1. The way back is exact.
    """
    if state.get("by_epoch"):
        return dict(state)
    scaled = dict(state)
    for key, factor in (("begin", per_step * stretch), ("end", per_step * stretch), ("_global_step", per_step)):
        if key in scaled:
            scaled[key] = int(scaled[key] * factor)
    span = scaled["end"] - scaled["begin"]
    if "T_max" in scaled:
        scaled["T_max"] = span
    if "total_iters" in scaled:
        scaled["total_iters"] = span - 1 if stretch != 1 else _plain(Fraction(state["total_iters"]) * per_step)
    scaled["last_step"] = _place(state, scaled, per_step, stretch)
    return scaled


def _place(state: dict[str, Any], scaled: dict[str, Any], per_step: Fraction, stretch: Fraction) -> float:
    """`last_step` on the new ranks. Before it begins the shift waits there; at its end it stays at the same share."""
    last = Fraction(state["last_step"])
    if scaled["_global_step"] < scaled["begin"]:
        return _plain(last * per_step if last < 0 else Fraction(-1))
    is_over = state["_global_step"] >= state["end"]
    if is_over and stretch == 1:
        return _plain(last * per_step)
    absolute = state["_global_step"] if is_over else state["begin"] + last
    moved = per_step * (absolute - 1) + 1 - scaled["begin"]
    return _plain(min(moved, Fraction(scaled["end"] - scaled["begin"] - 1)))


def _plain(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)
