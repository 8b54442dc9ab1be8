"""Puts the speed layer into an XTuner run: `prepare` edits the loaded config, the hook applies the rest when the model is built.

A part that this model, config or device cannot take is left out with one line in the log; nothing here stops a run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Final

import torch
from mmengine.hooks import Hook
from torch import nn

from core.files import write_json
from core.xtuner.runtime.speed import memory, parts
from core.xtuner.runtime.speed.anatomy import Decoder, UnsupportedModelError, read_decoder
from core.xtuner.runtime.speed.attention import has_varlen_flash
from core.xtuner.runtime.speed.backend import has_triton
from core.xtuner.runtime.speed.batches import Pass
from core.xtuner.runtime.speed.decoder import FastPass, PassOptions
from core.xtuner.runtime.speed.parts import PartReport, Reports, Wish
from core.xtuner.runtime.speed.step import GroupedStep, LookAhead

REPORT_FILE: Final = "speed.json"
_TOKENS_PER_PASS: Final = 16384
"""More does not run faster on an H200: the matrix products are large enough by then."""


def prepare(config: Any, wish: Wish) -> None:
    """Change the loaded mmengine config in place, before the runner is built. Does nothing if no part is asked for."""
    if not wish.parts:
        return
    kept_bounds = parts.BLOCK_ATTENTION in wish and _keep_bounds(config)
    optimizer = config.optim_wrapper.get("optimizer", {})
    fused = parts.OPTIMIZER in wish and _can_fuse(config, optimizer)
    if fused:
        optimizer["fused"] = True
    hook = {
        "type": "core.xtuner.runtime.speed.install.SpeedHook",
        "wish": json.dumps(
            {
                "parts": sorted(wish.parts),
                "tokens_per_pass": wish.tokens_per_pass,
                "memory_limit_bytes": wish.memory_limit_bytes,
            }
        ),
        "kept_bounds": kept_bounds,
        "fused_optimizer": fused,
        # Before every other hook's before_train: samples are generated there.
        "priority": "VERY_HIGH",
    }
    config.custom_hooks = [*(config.get("custom_hooks") or []), hook]


def _can_fuse(config: Any, optimizer: Any) -> bool:
    """Whether torch's one-kernel AdamW can stand in: AdamW itself, on a GPU, not under DeepSpeed."""
    is_adamw = _name(optimizer.get("type")).split(".")[-1] == "AdamW"
    return is_adamw and torch.cuda.is_available() and config.get("strategy") is None


def _keep_bounds(config: Any) -> bool:
    """Ask XTuner's packer for the samples' bounds, and collate with them. Whether every training set could."""
    loader = config.train_dataloader
    collate = loader.get("collate_fn") or {}
    if not _name(collate.get("type")).endswith("default_collate_fn") or collate.get("use_varlen_attn"):
        return False
    if config.get("sequence_parallel_size", 1) > 1:
        return False
    sets = list(_datasets(loader.dataset))
    if not sets or not all(dataset.get("pack_to_max_length", True) for dataset in sets):
        return False
    for dataset in sets:
        dataset["use_varlen_attn"] = True
    loader.collate_fn = {"type": "core.xtuner.runtime.speed.batches.collate"}
    return True


def _datasets(node: Any) -> Any:
    """Every `process_hf_dataset` in a dataset config."""
    if isinstance(node, Mapping):
        if _name(node.get("type")).endswith("process_hf_dataset"):
            yield node
            return
        for value in node.values():
            yield from _datasets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _datasets(value)


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

    def before_train(self, runner: Any) -> None:
        reports = Reports(self.wish)
        if self.fused_optimizer:
            reports.on(parts.OPTIMIZER)
        elif parts.OPTIMIZER in self.wish:
            reports.off(parts.OPTIMIZER, "needs AdamW on a GPU without DeepSpeed")
        try:
            why = ""
            apply_to_runner(runner, self.wish, reports, kept_bounds=self.kept_bounds)
        except UnsupportedModelError as error:
            why = str(error)
        finished = reports.finish(why or "the fast pass is not in use")
        for report in finished:
            runner.logger.info(report.line())
        if runner.rank == 0:
            write_json(Path(runner.work_dir) / REPORT_FILE, [report.to_json() for report in finished])


def apply_to_runner(runner: Any, wish: Wish, reports: Reports, *, kept_bounds: bool) -> None:
    """Apply what needs the built run. Raises UnsupportedModelError if the fast pass cannot be used at all."""
    if parts.FAST_PASS not in wish:
        return
    if type(runner).__name__ != "Runner":
        raise UnsupportedModelError("DeepSpeed: its engine drives the steps itself")
    from xtuner.parallel.sequence import get_sequence_parallel_world_size

    if get_sequence_parallel_world_size() > 1:
        raise UnsupportedModelError("sequence parallelism")
    wrapped = runner.model
    model = wrapped.module if hasattr(wrapped, "module") else wrapped
    wrapper = runner.optim_wrapper
    dtype = getattr(wrapper, "cast_dtype", None)
    if dtype is None and hasattr(wrapper, "loss_scaler"):
        dtype = torch.float16  # what autocast takes on a GPU when nothing is named
    loader = LookAhead(iter(runner.train_loop.dataloader_iterator))
    batch = loader.upcoming(1)[0]["data"]
    micro_tokens = int(batch["input_ids"].numel())
    fast = apply(
        model,
        dtype=dtype,
        wish=wish,
        reports=reports,
        micro_tokens=micro_tokens,
        accumulation=wrapper._accumulative_counts,
    )
    if kept_bounds:
        reports.on(parts.BLOCK_ATTENTION)
    else:
        reports.off(
            parts.BLOCK_ATTENTION, "the data is not packed by XTuner's own packer, or flash-attn's varlen is in use"
        )
    group = max(1, fast.tokens_per_pass // micro_tokens) if parts.GROUPED in wish else 1
    runner.train_loop.dataloader_iterator = loader
    step = GroupedStep(
        wrapped, loader, group=group, by_sample=kept_bounds, device=next(model.parameters()).device,
        iteration=lambda: int(runner.train_loop.iter), seed=lambda at: (runner.seed * 1000003 + runner.rank * 7919 + at) % 2**31,
    )  # fmt: skip
    wrapped.train_step = step


class Applied:
    """What `apply` made: the pass, and how many tokens it may take."""

    def __init__(self, fast_pass: FastPass, tokens_per_pass: int) -> None:
        self.fast_pass = fast_pass
        self.tokens_per_pass = tokens_per_pass


def apply(
    model: nn.Module, *, dtype: torch.dtype | None, wish: Wish, reports: Reports, micro_tokens: int, accumulation: int
) -> Applied:
    """Give a SupervisedFinetune the fast pass: `model(batch: Pass, seed, mode="loss")` → `{"loss": (micro_batches)}`.

    dtype: of the matrix products (autocast's), None: the weights'. Raises UnsupportedModelError.
    """
    llm: Any = model.llm
    decoder = read_decoder(llm)
    device = decoder.embedding.get_parameter("weight").device
    if dtype is None:
        dtype = _weight_dtype(decoder)
    for group in decoder.groups:
        group.weight.settle(dtype, shared=group is decoder.head and decoder.tied)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _unpack(decoder, dtype, device, wish, reports)
    chosen = _plan(decoder, dtype, device, wish, micro_tokens, accumulation)
    names = {"norm": parts.NORM, "rotary": parts.ROTARY, "swiglu": parts.SWIGLU}
    kernels = frozenset(name for name, part in names.items() if part in wish)
    for part in names.values():
        if part in wish and has_triton() and device.type == "cuda":
            reports.on(part)
        elif part in wish:
            reports.off(part, "needs Triton on an NVIDIA GPU of compute capability 8.0 or newer")
    fast_pass = FastPass(
        decoder,
        PassOptions(
            dtype=dtype, recomputed_layers=chosen.recomputed_layers, block_tokens=chosen.block_tokens, kernels=kernels
        ),
    )
    _report_pass(decoder, dtype, device, chosen, wish, reports, micro_tokens)
    _take_over(model, fast_pass)
    return Applied(fast_pass, chosen.tokens)


def _weight_dtype(decoder: Decoder) -> torch.dtype:
    weight = decoder.head.weight.modules[0].get_parameter("weight")
    return weight.dtype


def _unpack(decoder: Decoder, dtype: torch.dtype, device: torch.device, wish: Wish, reports: Reports) -> None:
    packed = [group for group in decoder.groups if group.weight.packed]
    if not packed:
        if parts.UNPACKED in wish:
            reports.off(parts.UNPACKED, "the base is not in 4 bits")
        return
    needed = sum(group.weight.elements for group in packed) * dtype.itemsize
    if parts.UNPACKED not in wish:
        return
    if needed > 0.15 * memory.free_bytes(device, wish.memory_limit_bytes):
        reports.off(parts.UNPACKED, f"needs {needed / 2**30:.1f} GiB, better used for larger passes")
        return
    for group in packed:
        group.weight.unpack(dtype)
    reports.on(parts.UNPACKED, f"{needed / 2**30:.1f} GiB more, no unpacking in the steps")


def _plan(
    decoder: Decoder, dtype: torch.dtype, device: torch.device, wish: Wish, micro_tokens: int, accumulation: int
) -> memory.MemoryPlan:
    """The largest pass, in whole micro-batches that divide the accumulation, that fits; recomputing only as much as it must."""
    free = memory.free_bytes(device, wish.memory_limit_bytes)
    target = wish.tokens_per_pass or (_TOKENS_PER_PASS if device.type == "cuda" else micro_tokens)
    groups = [size for size in range(1, accumulation + 1) if accumulation % size == 0 and size * micro_tokens <= target]
    if parts.GROUPED not in wish:
        groups = []
    for size in sorted({1, *groups}, reverse=True):
        chosen = memory.plan(decoder, dtype, size * micro_tokens, free)
        # Computing layers twice to make a pass larger pays only while the pass is small.
        if chosen is not None and (chosen.recomputed_layers == 0 or size * micro_tokens <= 8192 or size == 1):
            return chosen
    return memory.MemoryPlan(
        tokens=micro_tokens, recomputed_layers=len(decoder.layers), block_tokens=512, expected_bytes=free
    )


def _report_pass(
    decoder: Decoder, dtype: torch.dtype, device: torch.device, chosen: memory.MemoryPlan, wish: Wish, reports: Reports,
    micro_tokens: int,
) -> None:  # fmt: skip
    probe = torch.empty(0, decoder.heads, decoder.dim, dtype=dtype, device=device)
    attention = "varlen flash attention" if has_varlen_flash(probe) else "attention sample by sample"
    reports.on(
        parts.FAST_PASS, f"{str(dtype).removeprefix('torch.')}, {attention}, {chosen.block_tokens} logits at a time"
    )
    layers = len(decoder.layers)
    if parts.GROUPED in wish:
        reports.on(parts.GROUPED, f"{chosen.tokens // micro_tokens} micro-batches, {chosen.tokens} tokens in a pass")
    if parts.RECOMPUTE in wish:
        reports.on(parts.RECOMPUTE, f"{chosen.recomputed_layers} of {layers} layers computed again")


def _take_over(model: Any, fast_pass: FastPass) -> None:
    stock = model.compute_loss

    def compute_loss(self: Any, data: Any, data_samples: Any = None) -> Any:
        """The fast pass for a `Pass` (data_samples is then the seed), the stock loss for anything else."""
        if isinstance(data, Pass):
            return {"loss": fast_pass(data, int(data_samples), training=self.training)}
        return stock(data, data_samples)

    model.compute_loss = MethodType(compute_loss, model)


def read_reports(run: Path) -> Sequence[PartReport]:
    """What speed.json of a run says; empty if the run has none."""
    file = run / REPORT_FILE
    if not file.is_file():
        return []
    return [PartReport(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
