"""Puts the speed layer into an XTuner run: `prepare` edits the loaded config, the hook applies the rest when the model is built.

A part that this model, config or device cannot take is left out with one line in the log; nothing here stops a run.
"""

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.hooks import Hook
from torch import distributed

from core.files import write_json
from core.messages import Message, message
from core.xtuner.runtime.speed import parts
from core.xtuner.runtime.speed.anatomy import UnsupportedModelError
from core.xtuner.runtime.speed.apply import apply
from core.xtuner.runtime.speed.batches import without_bounds
from core.xtuner.runtime.speed.parts import PartReport, Reports, Wish
from core.xtuner.runtime.speed.step import EngineStep, GroupedStep, LookAhead, PlainStep, keep_training_mode

_LOOPS: Final = ("TrainLoop", "IterBasedTrainLoop")
"""XTuner's and mmengine's loops that take one batch after the other."""


def prepare(config: Any, wish: Wish, *, has_deepspeed: bool = False) -> None:
    """Change the loaded mmengine config in place, before the runner is built. Does nothing if no part is asked for."""
    if not wish.parts:
        return
    kept_bounds = {parts.FAST_PASS, parts.BLOCK_ATTENTION} <= wish.parts and _keep_bounds(config)
    optimizer = config.optim_wrapper.get("optimizer", {})
    fused = parts.OPTIMIZER in wish and not has_deepspeed and _can_fuse(config, optimizer)
    if fused:
        optimizer["fused"] = True
    hook = {
        "type": "core.xtuner.runtime.speed.install.SpeedHook",
        "wish": json.dumps(wish.to_json()),
        "kept_bounds": kept_bounds,
        "fused_optimizer": fused,
        # Before every other hook's before_train: samples are generated there.
        "priority": "VERY_HIGH",
    }
    config.custom_hooks = [*(config.get("custom_hooks") or []), hook]


def _can_fuse(config: Any, optimizer: Any) -> bool:
    """Whether torch's one-kernel AdamW can stand in: AdamW itself, on a GPU."""
    is_adamw = _name(optimizer.get("type")).split(".")[-1] == "AdamW"
    return is_adamw and torch.cuda.is_available() and config.get("strategy") is None


def _keep_bounds(config: Any) -> bool:
    """Ask XTuner's packer for the samples' bounds, and collate with them. Whether every training set could."""
    loader = config.train_dataloader
    collate = loader.get("collate_fn") or {}
    if _name(config.train_cfg.get("type")).split(".")[-1] not in _LOOPS:
        return False
    is_plain = _name(collate.get("type")).endswith("default_collate_fn") and not collate.get("use_varlen_attn")
    if not is_plain or config.get("sequence_parallel_size", 1) > 1:
        return False
    sets = list(packable_sets(loader.dataset))
    if not sets or not all(dataset.get("pack_to_max_length", True) for dataset in sets):
        return False
    for dataset in sets:
        dataset["use_varlen_attn"] = True
    loader.collate_fn = {"type": "core.xtuner.runtime.speed.batches.collate"}
    return True


def packable_sets(node: Any) -> Iterator[Any]:
    """Every `process_hf_dataset` in a dataset config."""
    if isinstance(node, Mapping):
        if _name(node.get("type")).endswith("process_hf_dataset"):
            yield node
            return
        for value in node.values():
            yield from packable_sets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from packable_sets(value)


def _name(kind: Any) -> str:
    """The name of a config's `type`, which may be a string, a class or one of mmengine's lazy objects."""
    if isinstance(kind, str):
        return kind
    return str(getattr(kind, "__name__", None) or getattr(kind, "name", None) or kind)


class SpeedHook(Hook):
    """Applies the speed layer when the run is built, and writes speed.json beside the run's files."""

    def __init__(self, wish: str, kept_bounds: bool, fused_optimizer: bool) -> None:
        self.wish = Wish.from_json(json.loads(wish))
        self.kept_bounds = kept_bounds
        self.fused_optimizer = fused_optimizer
        self._reports = Reports(self.wish)

    def before_train(self, runner: Any) -> None:
        why = self._apply(runner)
        reports = self._reports
        if why is not None:  # what was said of single parts before it failed does not hold
            reports = Reports(self.wish)
        if self.fused_optimizer:
            reports.on(parts.OPTIMIZER)
        elif parts.OPTIMIZER in self.wish:
            reports.off(parts.OPTIMIZER, message("speed.left.optimizer"))
        self._report(runner, reports.finish(why or message("speed.left.no_fast_pass")))

    def _apply(self, runner: Any) -> Message | None:
        """Why the model was left as it is, on every rank if on one; None if it was not."""
        loop = runner.train_loop
        if not hasattr(loop, "dataloader_iterator"):
            return message("speed.left.other_loop")
        loop.dataloader_iterator = loader = LookAhead(iter(loop.dataloader_iterator))
        step, why = self._step(runner, loader)
        group = agree(0 if step is None else step.group)
        if step is not None and group:
            step.group = group
            runner.model.train_step = step
            keep_training_mode(runner.model)
            return None
        if self.kept_bounds:
            # The model computes as before, so the batches must be as before.
            loop.dataloader_iterator = map(without_bounds, loader)
        return why or message("speed.left.other_rank")

    def _step(self, runner: Any, loader: LookAhead) -> tuple[GroupedStep | None, Message | None]:
        try:
            return make_step(runner, loader, self.wish, self._reports, kept_bounds=self.kept_bounds), None
        except UnsupportedModelError as error:
            return None, error.why
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost a person the run
            traceback.print_exc()
            return None, message("speed.left.trial_failed", error=f"{type(error).__name__}: {error}"[:200])

    def _report(self, runner: Any, finished: Sequence[PartReport]) -> None:
        for report in finished:
            runner.logger.info(report.line())
        if runner.rank == 0:
            write_json(Path(runner.work_dir) / parts.REPORT_FILE, [report.to_json() for report in finished])


def agree(value: int) -> int:
    """The least of all ranks: each must take as many passes as the others, for some exchange gradients in every one."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return value
    told = torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")
    distributed.all_reduce(told, distributed.ReduceOp.MIN)
    return int(told)


def make_step(runner: Any, loader: LookAhead, wish: Wish, reports: Reports, *, kept_bounds: bool) -> GroupedStep:
    """Apply what needs the built run; what takes its steps. Raises UnsupportedModelError if the fast pass cannot be used at all."""
    if parts.FAST_PASS not in wish:
        raise UnsupportedModelError(message("speed.left.no_fast_pass"))
    from xtuner.parallel.sequence import get_sequence_parallel_world_size

    if get_sequence_parallel_world_size() > 1:
        raise UnsupportedModelError(message("speed.left.sequence_parallel"))
    wrapper, wrapped = runner.optim_wrapper, runner.model
    engine = wrapper.model.model if hasattr(wrapper, "model") else None
    held = wrapped if engine is None else engine
    model = held.module if hasattr(held, "module") else held
    upcoming = loader.upcoming(1)
    if not upcoming:
        raise UnsupportedModelError(message("speed.left.no_data"))
    batch = upcoming[0]["data"]
    accumulation = wrapper._accumulative_counts if engine is None else engine.gradient_accumulation_steps()
    applied = apply(
        model, dtype=_autocast_dtype(wrapper), wish=wish, reports=reports, batch=batch, accumulation=accumulation,
        reserved_bytes=_bucket_bytes(engine),
    )  # fmt: skip
    step: type[GroupedStep] = PlainStep if engine is None else EngineStep
    return step(
        held,
        wrapper,
        loader,
        group=max(1, applied.tokens_per_pass // int(batch["input_ids"].numel())) if parts.GROUPED in wish else 1,
        by_sample=_report_bounds(batch, reports, kept_bounds=kept_bounds),
        device=next(model.parameters()).device,
        seed=lambda: (runner.seed * 1000003 + runner.rank * 7919 + int(runner.train_loop.iter)) % 2**31,
        tighten=applied.tighten,
    )


def _bucket_bytes(engine: Any) -> int:
    """What DeepSpeed takes on the device with the first gradient (0.19, ZeRO-1 and 2): two buckets where it reduces while it computes."""
    optimizer = getattr(engine, "optimizer", None)
    elements = int(getattr(optimizer, "reduce_bucket_size", 0))
    return 2 * elements * (2 if getattr(optimizer, "overlap_comm", False) else 1)


def _autocast_dtype(wrapper: Any) -> torch.dtype | None:
    """What mmengine's AMP casts to; None without AMP."""
    dtype: torch.dtype | None = getattr(wrapper, "cast_dtype", None)
    if dtype is None and hasattr(wrapper, "loss_scaler"):
        return torch.float16  # what autocast takes on a GPU when nothing is named
    return dtype


def _report_bounds(batch: Mapping[str, Any], reports: Reports, *, kept_bounds: bool) -> bool:
    """Whether attention stays inside each packed sample: by our bounds, or by those that the config itself asks for."""
    if kept_bounds:
        reports.on(parts.BLOCK_ATTENTION)
    elif batch.get("cumulative_len") is not None:
        reports.on(parts.BLOCK_ATTENTION, message("speed.on.as_configured"))
        return True
    else:
        reports.off(parts.BLOCK_ATTENTION, message("speed.left.not_packed"))
    return kept_bounds
