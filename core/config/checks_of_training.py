"""Checks of how it trains: schedule, precision, method, DeepSpeed, checkpoints, attention."""

from collections.abc import Iterator
from functools import partial
from typing import Final

from core.config.edits import method_of, without_warmup
from core.config.findings import Check, Context, Finding, Severity, found, iterations_per_epoch, number
from core.config.source import ConfigSource
from core.config.validation import read_validation
from core.config.values import Code

_USUAL_LR: Final = {"qlora": (2e-5, 1e-3), "lora": (2e-5, 1e-3), "full": (1e-6, 1e-4)}
_BYTES_PER_WEIGHT_SAVED: Final = {"full": 8.0, "lora": 0.15, "qlora": 0.4}
"""Bytes of one checkpoint per byte of half-precision base weights: full keeps fp32 weights and two Adam moments; LoRA a few percent."""


def check_warmup(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """`int(warmup_ratio * max_epochs * iterations)` of 0 gives mmengine a scheduler that ends where it begins: ValueError."""
    iterations = iterations_per_epoch(source, context)
    if iterations is None or not source.has("param_scheduler[LinearLR].end"):
        return
    end = source.effective("param_scheduler[LinearLR].end")
    if not isinstance(end, int | float) or source.effective("param_scheduler[LinearLR].by_epoch") is False:
        return
    if int(end * iterations[0]) == 0:
        # Our runtime leaves such a warm-up out; the config alone would stop `xtuner train`.
        line = source.line_of("param_scheduler[LinearLR]")
        yield found(
            "warmup_zero", Severity.WARNING, line=line, fix=without_warmup, low=iterations[0], high=iterations[1]
        )


def check_save_steps(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """A checkpoint between two optimizer steps loses the gradients gathered so far; steps here are micro-steps."""
    steps, counts = number(source, "save_steps", 0), number(source, "accumulative_counts", 1)
    if steps and counts and steps % counts:
        rounded = int(max(counts, round(steps / counts) * counts))
        fix = lambda edited: edited.set("save_steps", rounded)  # noqa: E731
        line = source.line_of("save_steps")
        yield found(
            "save_steps", Severity.WARNING, line=line, fix=fix, steps=int(steps), counts=int(counts), rounded=rounded
        )
    iterations = iterations_per_epoch(source, context)
    if iterations is None:
        return
    fewest, most = (count * number(source, "max_epochs", 1) for count in iterations)
    if counts > most:
        fewer = max(1, int(fewest) // 10)
        fix = lambda edited: edited.set("accumulative_counts", fewer)  # noqa: E731
        line = source.line_of("accumulative_counts")
        yield found(
            "no_optimizer_step", Severity.ERROR, line=line, fix=fix, counts=int(counts), most=int(most), fewer=fewer
        )


def check_varlen(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Variable-length attention needs flash-attn, packing, and one pack a micro-batch (xtuner/model/sft.py, collate_fns)."""
    if source.effective("use_varlen_attn") is not True:
        return
    line = source.line_of("use_varlen_attn")
    if not context.machine.has_flash_attention:
        fix = lambda edited: edited.set("use_varlen_attn", False)  # noqa: E731
        yield found("varlen", Severity.ERROR, line=line, fix=fix)
    if source.effective("pack_to_max_length", True) is not True:
        fix = lambda edited: edited.set("pack_to_max_length", True)  # noqa: E731
        yield found("varlen_packing", Severity.ERROR, line=line, fix=fix)
    batch = int(number(source, "batch_size", 1))
    if batch > 1:
        # As written: XTuner's `accumulative_counts *= sequence_parallel_size` comes after it and stays.
        written = source.get("accumulative_counts", 1)
        counts = (written if isinstance(written, int) else int(number(source, "accumulative_counts", 1))) * batch
        fix = lambda edited: edited.set("batch_size", 1).set("accumulative_counts", counts)  # noqa: E731
        yield found(
            "varlen_batch", Severity.ERROR, line=source.line_of("batch_size"), fix=fix, batch=batch, counts=counts
        )


def check_precision(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The dtype of AMP fits the hardware; its gradient scaler takes float32 gradients only, so trained weights must be float32.

    torch: `_amp_foreach_non_finite_check_and_unscale_cuda` knows no bfloat16, and float16 gradients are refused (xtuner issue 960).
    """
    amp, line = source.get("optim_wrapper.dtype", None), source.line_of("optim_wrapper.dtype")
    weights = str(source.get("model.llm.torch_dtype", None)).rpartition(".")[2]
    if context.deepspeed is not None:
        return
    if context.machine.gpu_count and context.machine.supports_bf16 is False and "bfloat16" in {amp, weights}:
        yield found("no_bf16", Severity.ERROR, line=line or source.line_of("model.llm.torch_dtype"), fix=_to_float16)
    elif context.machine.supports_bf16 and amp == "float16":
        yield found("prefer_bf16", Severity.ADVICE, line=line, fix=_to_bfloat16)
    is_scaled = source.type_name("optim_wrapper") == "AmpOptimWrapper" and context.machine.gpu_count > 0
    if method_of(source) == "full" and weights in {"float16", "bfloat16"} and is_scaled:
        fix = lambda edited: edited.set("model.llm.torch_dtype", Code("torch.float32"))  # noqa: E731
        yield found("half_full", Severity.ERROR, line=source.line_of("model.llm.torch_dtype"), fix=fix, weights=weights)


def check_optimizer(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The 8-bit and paged optimizers are bitsandbytes', whose kernels need a GPU."""
    name = str(source.get("optim_type", "")).rpartition(".")[2]
    if not ("8bit" in name or name.startswith("Paged")):
        return
    if not context.machine.has_bitsandbytes or not context.machine.gpu_count:
        fix = lambda edited: edited.set("optim_type", Code("AdamW"))  # noqa: E731
        yield found("optimizer", Severity.ERROR, line=source.line_of("optim_type"), fix=fix, name=name)


def check_quantization(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """QLoRA needs bitsandbytes, a GPU to be of use, and a base that is not quantised yet."""
    if method_of(source) != "qlora":
        return
    line = source.line_of("model.llm.quantization_config")
    drop = lambda edited: edited.delete("model.llm.quantization_config")  # noqa: E731
    if not context.machine.has_bitsandbytes:
        yield found("no_bitsandbytes", Severity.ERROR, line=line, fix=drop)
    elif not context.machine.gpu_count:
        yield found("qlora_on_cpu", Severity.WARNING, line=line, fix=drop)
    if context.model is not None and context.model.is_quantized:
        yield found("quantized_twice", Severity.ERROR, line=line, fix=drop)


def check_learning_rate(source: ConfigSource, context: Context) -> Iterator[Finding]:
    del context
    method, rate = method_of(source), source.effective("lr")
    low, high = _USUAL_LR[method]
    if isinstance(rate, int | float) and not low <= rate <= high:
        usual = 2e-5 if method == "full" else 2e-4
        fix = lambda edited: edited.set("lr", usual)  # noqa: E731
        line = source.line_of("lr")
        yield found(
            "learning_rate",
            Severity.WARNING,
            line=line,
            fix=fix,
            rate=f"{rate:g}",
            low=f"{low:g}",
            high=f"{high:g}",
            usual=f"{usual:g}",
        )


def check_attention(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """InternLM2's own code falls back to eager attention where flash-attn is missing, unless told; our runtime tells it."""
    if context.model is None or not context.model.is_internlm2 or context.machine.has_flash_attention:
        return
    if source.get("model.llm.attn_implementation", None) is None and source.has("model.llm"):
        fix = lambda edited: edited.set("model.llm.attn_implementation", "sdpa")  # noqa: E731
        yield found("eager_attention", Severity.ADVICE, line=source.line_of("model.llm"), fix=fix)


def check_length(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Positions beyond those the model was trained for mean nothing to it, unless the config scales them."""
    length = int(number(source, "max_length", 0))
    limit = context.model.context_length if context.model is not None else None
    if limit is None or length <= limit or source.has("model.max_position_embeddings"):
        return
    fix = lambda edited: edited.set("max_length", limit)  # noqa: E731
    line = source.line_of("max_length")
    yield found("too_long", Severity.WARNING, line=line, fix=fix, length=length, limit=limit)


def check_disk(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Room for `save_total_limit` checkpoints (two where it has no end), the best one, and one more while the oldest is not yet deleted."""
    free, model, keep = context.machine.free_bytes, context.model, int(number(source, "save_total_limit", 2))
    counted = keep if keep > 0 else 2
    if free is None or model is None or not model.weight_bytes:
        return
    one = model.weight_bytes * _BYTES_PER_WEIGHT_SAVED[method_of(source)]
    validation = read_validation(source)
    is_best_kept = validation is not None and validation.save_best
    needed = one * (counted + 1 + is_best_kept)
    if needed > free:
        line = source.line_of("save_total_limit")
        needed_gib, free_gib = round(needed / 2**30, 1), round(free / 2**30, 1)
        fewer = int(free / one) - 1 - is_best_kept if one else 0
        fix = (lambda edited: edited.set("save_total_limit", fewer)) if 0 < fewer != keep else None
        yield found(
            "disk",
            Severity.ERROR,
            line=line,
            fix=fix,
            keep=counted,
            needed_gib=needed_gib,
            free_gib=free_gib,
            fewer=fewer,
        )
    elif keep <= 0:
        fix = lambda edited: edited.set("save_total_limit", 3)  # noqa: E731
        yield found("keep_all", Severity.ADVICE, line=source.line_of("save_total_limit"), fix=fix)


TRAINING_CHECKS: Final[tuple[Check, ...]] = (
    check_warmup,
    check_save_steps,
    check_varlen,
    check_precision,
    check_optimizer,
    check_quantization,
    check_learning_rate,
    check_attention,
    check_length,
    check_disk,
)


def _precision(source: ConfigSource, name: str) -> ConfigSource:
    if source.has("optim_wrapper.dtype"):
        source = source.set("optim_wrapper.dtype", name)
    if name == "bfloat16" and source.has("optim_wrapper.loss_scale"):
        source = source.delete("optim_wrapper.loss_scale")
    for path in ("model.llm.torch_dtype", "model.llm.quantization_config.bnb_4bit_compute_dtype"):
        if source.has(path):
            source = source.set(path, Code(f"torch.{name}"))
    return source


_to_float16 = partial(_precision, name="float16")
_to_bfloat16 = partial(_precision, name="bfloat16")
