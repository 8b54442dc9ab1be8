"""Gives a built model the fast pass: what fits in memory, a trial against the stock loss, and the change of the model's loss.

Knows nothing of the runner. A kernel that does not run here is left out; a model whose loss would differ is left as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from core.messages import message
from core.xtuner.runtime.speed import memory, parts
from core.xtuner.runtime.speed.anatomy import Decoder, UnsupportedModelError, read_decoder
from core.xtuner.runtime.speed.attention import has_varlen_flash
from core.xtuner.runtime.speed.backend import has_triton
from core.xtuner.runtime.speed.batches import Pass, flatten
from core.xtuner.runtime.speed.decoder import FastPass, PassOptions
from core.xtuner.runtime.speed.parts import Reports, Wish

_TOKENS_PER_PASS: Final = 16384
"""More does not run faster on an H200: the matrix products are large enough by then."""
_RECOMPUTED_TOKENS: Final = 8192
"""Computing layers twice to make a pass larger pays only while the pass is smaller than this."""
_UNPACKED_SHARE: Final = 0.15
"""Of the free memory: more for unpacked weights is better used for larger passes."""
_PROBE_TOKENS: Final = 128
_LEAST_BLOCK: Final = 512
"""Tokens whose logits exist at one time where memory is short."""
_TOLERANCE: Final = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative difference of the losses of the trial that rounding explains; 16-bit types see the default."""
_TOLERANCE_16_BIT: Final = 0.02
_KERNELS: Final = {"norm": parts.NORM, "rotary": parts.ROTARY, "swiglu": parts.SWIGLU}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the pass is for."""

    dtype: torch.dtype
    device: torch.device
    micro_tokens: int
    accumulation: int
    recomputes: bool
    """Whether the config asks for activation checkpointing."""
    reserved_bytes: int
    """What someone else will take before the first pass is over."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` made: the pass, and how many tokens it may take."""

    fast_pass: FastPass
    tokens_per_pass: int

    def tighten(self) -> bool:
        """Keep as little as a pass can; False if that is so already."""
        least = replace(
            self.fast_pass.options,
            recomputed_layers=len(self.fast_pass.decoder.layers),
            block_tokens=_LEAST_BLOCK,
        )
        changed = least != self.fast_pass.options
        self.fast_pass.options = least
        return changed


def apply(
    model: nn.Module,
    *,
    dtype: torch.dtype | None,
    wish: Wish,
    reports: Reports,
    batch: Mapping[str, Any],
    accumulation: int,
    reserved_bytes: int = 0,
) -> Applied:
    """Give a SupervisedFinetune the fast pass: `model(batch: Pass, seed, mode="loss")` → `{"loss": (micro_batches)}`.

    dtype: of the matrix products (autocast's), None: the embedding's. batch: the `data` of a micro-batch, for sizes and the trial.
    reserved_bytes: on the device, for what is not there yet. Raises UnsupportedModelError; the model then computes as before.
    """
    decoder = read_decoder(model.llm)
    device = decoder.embedding.get_parameter("weight").device
    site = Site(
        dtype=dtype or decoder.embedding.get_parameter("weight").dtype,
        device=device,
        micro_tokens=int(batch["input_ids"].numel()),
        accumulation=accumulation,
        recomputes=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        reserved_bytes=reserved_bytes,
    )
    probe = _probe(batch)
    expected = _stock_loss(model, probe, dtype, device)
    for group in decoder.groups:
        group.weight.settle(site.dtype, shared=group is decoder.head and decoder.tied)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _unpack(decoder, site, wish, reports)
    chosen = _plan(decoder, site, wish)
    options = PassOptions(
        dtype=site.dtype,
        recomputed_layers=chosen.recomputed_layers,
        block_tokens=chosen.block_tokens,
        kernels=_kernels(wish, reports, device),
    )
    fast_pass = _tried(decoder, options, reports, probe, expected)
    _report_pass(decoder, site, chosen, wish, reports)
    _take_over(model, fast_pass)
    return Applied(fast_pass, chosen.tokens)


def _probe(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The first tokens of a micro-batch as one row, every one of them predicted."""
    ids = batch["input_ids"][:1, :_PROBE_TOKENS].clone()
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "position_ids": torch.arange(ids.shape[1])[None],
    }


def _stock_loss(model: Any, probe: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device) -> float:
    """What the model's own forward pass says, without dropout. The random generators are left where they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model.compute_loss({name: tensor.to(device) for name, tensor in probe.items()})
        return float(outputs["loss"])
    finally:
        for module, is_training in modes:
            module.training = is_training


def _tried(
    decoder: Decoder, options: PassOptions, reports: Reports, probe: Mapping[str, Tensor], expected: float
) -> FastPass:
    """The pass, after one forward and backward on the probe. Raises UnsupportedModelError if its loss is not the stock one."""
    device = decoder.embedding.get_parameter("weight").device
    batch = flatten([probe], device, by_sample=False)
    fast_pass = FastPass(decoder, options)
    try:
        loss = float(fast_pass(batch, 1, training=False).sum())
        torch.autograd.grad(fast_pass(batch, 1).sum(), decoder.parameters)
    except Exception as error:  # a compiler or a driver may raise anything
        if not options.kernels:
            raise UnsupportedModelError(message("speed.left.trial_failed", error=_first_line(error))) from error
        for name in options.kernels:
            reports.off(_KERNELS[name], message("speed.left.does_not_run", error=_first_line(error)))
        return _tried(decoder, replace(options, kernels=frozenset()), reports, probe, expected)
    tolerance = _TOLERANCE.get(options.dtype, _TOLERANCE_16_BIT)
    if not abs(loss - expected) <= tolerance * max(1.0, abs(expected)):
        raise UnsupportedModelError(message("speed.left.other_loss", loss=round(loss, 5), expected=round(expected, 5)))
    return fast_pass


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _kernels(wish: Wish, reports: Reports, device: torch.device) -> frozenset[str]:
    can_run = has_triton() and device.type == "cuda"
    for part in _KERNELS.values():
        if part in wish and can_run:
            reports.on(part)
        elif part in wish:
            reports.off(part, message("speed.left.no_triton"))
    return frozenset(name for name, part in _KERNELS.items() if part in wish)


def _unpack(decoder: Decoder, site: Site, wish: Wish, reports: Reports) -> None:
    if parts.UNPACKED not in wish:
        return
    packed = [group for group in decoder.groups if group.weight.packed]
    if not packed:
        reports.off(parts.UNPACKED, message("speed.left.not_4bit"))
        return
    needed = sum(group.weight.elements for group in packed) * site.dtype.itemsize
    if needed > _UNPACKED_SHARE * _free_bytes(site, wish):
        reports.off(parts.UNPACKED, message("speed.left.unpacked_too_large", gib=_gib(needed)))
        return
    for group in packed:
        group.weight.unpack(site.dtype)
    reports.on(parts.UNPACKED, message("speed.on.unpacked", gib=_gib(needed)))


def _free_bytes(site: Site, wish: Wish) -> int:
    return max(0, memory.free_bytes(site.device, wish.memory_limit_bytes) - site.reserved_bytes)


def _plan(decoder: Decoder, site: Site, wish: Wish) -> memory.MemoryPlan:
    """The largest pass, in whole micro-batches that divide the accumulation, that fits; recomputing only as much as it must."""
    free = _free_bytes(site, wish)
    micro = site.micro_tokens
    target = wish.tokens_per_pass or (_TOKENS_PER_PASS if site.device.type == "cuda" else micro)
    accumulation = range(1, site.accumulation + 1)
    groups = [size for size in accumulation if site.accumulation % size == 0 and size * micro <= target]
    layers = len(decoder.layers)
    fewest = layers if parts.RECOMPUTE not in wish and site.recomputes else 0
    for size in sorted({1, *(groups if parts.GROUPED in wish else [])}, reverse=True):
        chosen = memory.plan(decoder, site.dtype, size * micro, free, fewest_recomputed=fewest)
        is_fast = chosen is not None and (chosen.recomputed_layers == fewest or size * micro <= _RECOMPUTED_TOKENS)
        if chosen is not None and (is_fast or size == 1):
            return chosen
    return memory.MemoryPlan(tokens=micro, recomputed_layers=layers, block_tokens=_LEAST_BLOCK, expected_bytes=free)


def _report_pass(decoder: Decoder, site: Site, chosen: memory.MemoryPlan, wish: Wish, reports: Reports) -> None:
    probe = torch.empty(0, decoder.heads, decoder.dim, dtype=site.dtype, device=site.device)
    kind = message("speed.on.flash" if has_varlen_flash(probe) else "speed.on.sample_by_sample")
    dtype = str(site.dtype).removeprefix("torch.")
    reports.on(parts.FAST_PASS, message("speed.on.fast_pass", dtype=dtype, attention=kind, tokens=chosen.block_tokens))
    if parts.GROUPED in wish:
        count = chosen.tokens // site.micro_tokens
        reports.on(parts.GROUPED, message("speed.on.grouped", count=count, tokens=chosen.tokens))
    if parts.RECOMPUTE in wish:
        layers = {"count": chosen.recomputed_layers, "layers": len(decoder.layers)}
        reports.on(parts.RECOMPUTE, message("speed.on.recomputed", **layers))


def _take_over(model: Any, fast_pass: FastPass) -> None:
    stock = model.compute_loss

    def compute_loss(self: Any, data: Any, data_samples: Any = None) -> Any:
        """The fast pass for a `Pass` (data_samples is then the seed), the stock loss for anything else."""
        if isinstance(data, Pass):
            return {"loss": fast_pass(data, int(data_samples), training=self.training)}
        return stock(data, data_samples)

    model.compute_loss = MethodType(compute_loss, model)
