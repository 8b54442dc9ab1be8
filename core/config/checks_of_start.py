"""Checks of how it is started: DeepSpeed, number of ranks, and what goes with them. A fix may be another choice on the launch page."""

from collections.abc import Iterator
from typing import Final

from core.config.edits import method_of
from core.config.findings import Check, Context, Finding, Severity, found, number
from core.config.source import ConfigSource

_SAFE: Final = "deepspeed_zero2"


def check_sequence_parallel(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Sequence parallelism needs flash-attn, DeepSpeed, a rank count that it divides, and its own sampler (xtuner/tools/train.py)."""
    size = int(number(source, "sequence_parallel_size", 1))
    if size <= 1:
        return
    line = source.line_of("sequence_parallel_size")
    off = lambda edited: edited.set("sequence_parallel_size", 1)  # noqa: E731
    if not context.machine.has_flash_attention or context.world_size % size:
        yield found("sequence_parallel", Severity.ERROR, line=line, fix=off, size=size, world_size=context.world_size)
    elif context.deepspeed is None:
        yield found("sequence_parallel_deepspeed", Severity.ERROR, line=line, choose=_SAFE, size=size)
    # XTuner's configs choose it by the size, `SequenceParallelSampler if sequence_parallel_size > 1 else …`: such a choice is theirs.
    sampler = str(source.get("train_dataloader.sampler.type", "")).rpartition(".")[2]
    if sampler.isidentifier() and sampler != "SequenceParallelSampler":
        yield found("sequence_parallel_sampler", Severity.ERROR, line=line, fix=off, size=size)


def check_zero3(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """4-bit weights cannot be split by ZeRO-3."""
    if method_of(source) == "qlora" and "zero3" in (context.deepspeed or ""):
        line = source.line_of("model.llm.quantization_config")
        yield found("qlora_zero3", Severity.ERROR, line=line, choose=_SAFE, deepspeed=context.deepspeed)


def check_full(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Full fine-tuning on GPUs is meant for DeepSpeed: without it optimizer states are not split."""
    if method_of(source) == "full" and context.machine.gpu_count and context.deepspeed is None:
        yield found("full_without_deepspeed", Severity.WARNING, choose=_SAFE)


def check_deepspeed(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """DeepSpeed 0.15.2–0.18.9 drops all micro-batches but first and last with optimizer offload and accumulation over 2."""
    version, counts = context.machine.deepspeed_version, number(source, "accumulative_counts", 1)
    if context.deepspeed is None:
        return
    if version is None:
        yield found("no_deepspeed", Severity.ERROR, choose="none", deepspeed=context.deepspeed)
    elif (
        "offload" in context.deepspeed
        and "zero3" not in context.deepspeed
        and counts > 2
        and (0, 15, 2) <= _parts(version) <= (0, 18, 9)
    ):
        choice = context.deepspeed.removesuffix("_offload")
        yield found("offload_drops", Severity.ERROR, choose=choice, version=version, counts=int(counts))


START_CHECKS: Final[tuple[Check, ...]] = (check_sequence_parallel, check_zero3, check_full, check_deepspeed)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".")[:3] if part.isdigit())
