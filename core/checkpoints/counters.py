"""Counters of mmengine's training loop when the number of ranks changes: iteration, schedulers, data position.

An iteration is one micro-batch of one rank. With accumulation × ranks held constant, one optimizer step takes old/new times
as many iterations, so all of them scale by that (mmengine 0.10: `IterBasedTrainLoop`, `_ParamScheduler`).
"""

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


def rescale_counters(states: dict[str, Any], old: int, new: int) -> None:
    """Scale the counters in `states` (a DeepSpeed model_states dict or a plain checkpoint) in place; nothing else is touched.

    What is changed is replaced, not mutated, so that memory-mapped or shared parts of the source stay as they are.
    """
    if old == new or "meta" not in states:
        return
    states["meta"] = {**states["meta"], "iter": states["meta"]["iter"] * old // new}
    schedulers = states.get("param_schedulers")
    if isinstance(schedulers, dict):
        states["param_schedulers"] = {
            name: [_scheduler(s, old, new) for s in group] for name, group in schedulers.items()
        }
    elif schedulers:
        states["param_schedulers"] = [_scheduler(scheduler, old, new) for scheduler in schedulers]


def _scheduler(state: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    if state.get("by_epoch"):
        return dict(state)
    scaled = dict(state)
    for key in ("begin", "end", "_global_step"):
        if key in scaled:
            scaled[key] = scaled[key] * old // new
    span = scaled["end"] - scaled["begin"]
    if "T_max" in scaled:
        scaled["T_max"] = span
    if "total_iters" in scaled:
        scaled["total_iters"] = span - 1
    last = span - 1 if "total_iters" in scaled else span
    scaled["last_step"] = max(0, min(scaled["_global_step"] - scaled["begin"], last))
    return scaled
