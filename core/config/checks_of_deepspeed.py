"""Checks of a DeepSpeed JSON: unknown keys, values that cannot be, and what contradicts the config. Starts nothing."""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from core.config.checks_of_start import check_deepspeed
from core.config.deepspeed import Setting, read_zero
from core.config.deepspeed_keys import AUTOMATIC, REPLACED, SECTIONS, Kind
from core.config.findings import Check, Context, Finding, Severity, number
from core.config.json_places import JsonObject
from core.config.source import ConfigSource
from core.errors import InputError
from core.messages import message

_STAGES: Final = (1, 2, 3)
_DEFAULT_CLIPPING: Final = 1.0
"""What XTuner clips at where the config says nothing (xtuner/tools/train.py)."""
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "bool": (bool,),
    "int": (int, float),
    "number": (int, float),
    "text": (str,),
    "object": (dict,),
    "any": (object,),
}


def check_keys(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Keys that DeepSpeed does not know, and values of another kind than it takes."""
    del source
    if context.setting is None:
        return
    for section, known in SECTIONS.items():
        values = _section(context.setting.json, section)
        for name, value in values.items():
            path = f"{section}.{name}" if section else name
            if name not in known:
                yield _unknown(context.setting.json, path, name, known, is_fatal=bool(section))
            elif value == "auto":
                yield from _automatic(context.setting.json, path, known[name])
            elif not _fits(value, known[name]):
                yield _found(
                    context.setting.json, path, "kind", Severity.ERROR, value=_short(value), kind=_kind(known[name])
                )


def check_zero(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The stage, and offload as XTuner's own optimizer can use it."""
    del source
    if context.setting is None:
        return
    json = context.setting.json
    section, zero = _section(json, "zero_optimization"), read_zero(json.values)
    find = partial(_found, json)
    if section.get("stage") not in _STAGES:
        yield find("zero_optimization.stage", "stage", Severity.ERROR, value=_short(section.get("stage")))
    if zero.stage != 3 and _section(json, "zero_optimization.offload_param").get("device", "none") != "none":
        yield find("zero_optimization.offload_param", "parameters_need_stage_3", Severity.ERROR, stage=zero.stage)
    if zero.offloads_optimizer and json.values.get("zero_force_ds_cpu_optimizer", True) is not False:
        yield find("zero_optimization.offload_optimizer", "needs_own_optimizer", Severity.ERROR)
    for name in ("offload_optimizer", "offload_param"):
        part = _section(json, f"zero_optimization.{name}")
        if part.get("device") == "nvme" and not part.get("nvme_path"):
            yield find(f"zero_optimization.{name}", "nvme_path", Severity.ERROR, name=name)
    if section.get("round_robin_gradients") is True:
        yield find("zero_optimization.round_robin_gradients", "round_robin", Severity.WARNING)


def check_batch(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Batch, accumulation and clipping: XTuner puts the config's numbers in, whatever the JSON says; DeepSpeed multiplies them."""
    if context.setting is None:
        return
    json = context.setting.json
    batch, counts = int(number(source, "batch_size", 1)), int(number(source, "accumulative_counts", 1))
    clipping = source.get("optim_wrapper.clip_grad.max_norm", None) if source.has("optim_wrapper.clip_grad") else None
    used = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": counts,
        "gradient_clipping": source.effective("max_norm", clipping or _DEFAULT_CLIPPING),
    }
    for name, value in used.items():
        written = json.values.get(name, "auto")
        if _is_number(written) and _is_number(value) and written != value:
            yield _found(json, name, "other_number", Severity.WARNING, value=_short(written), used=_short(value))
    whole = json.values.get("train_batch_size")
    expected = batch * counts * context.world_size
    if _is_number(whole) and whole != expected:
        yield _found(
            json, "train_batch_size", "train_batch", Severity.ERROR, value=whole, expected=expected, batch=batch, counts=counts,
            ranks=context.world_size,
        )  # fmt: skip


def check_dtype(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """The precision: DeepSpeed's replaces the config's AMP."""
    if context.setting is None:
        return
    json = context.setting.json
    half, brain = (_section(json, name).get("enabled", False) for name in ("fp16", "bf16"))
    configured = str(source.get("optim_wrapper.dtype", "") or "").rpartition(".")[2]
    if half is True and brain is True:
        yield _found(json, "bf16", "two_dtypes", Severity.ERROR)
    elif half is False and brain is False and context.machine.gpu_count:
        yield _found(json, "bf16", "float32", Severity.WARNING)
    elif brain is True and context.machine.gpu_count and context.machine.supports_bf16 is False:
        yield _found(json, "bf16", "no_bfloat16", Severity.ERROR)
    elif half is True and configured == "bfloat16":
        yield _found(json, "fp16", "other_dtype", Severity.WARNING, used="float16", configured=configured)
    elif brain is True and configured == "float16":
        yield _found(json, "bf16", "other_dtype", Severity.WARNING, used="bfloat16", configured=configured)


def check_drivers(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """What XTuner does itself: optimizer, schedule; and what does not go with ZeRO."""
    del source
    if context.setting is None:
        return
    json = context.setting.json
    if json.values.get("optimizer"):
        yield _found(json, "optimizer", "optimizer_ignored", Severity.WARNING)
    if json.values.get("scheduler"):
        yield _found(json, "scheduler", "second_schedule", Severity.ERROR)
    if _section(json, "amp").get("enabled") is True:
        yield _found(json, "amp", "amp", Severity.ERROR)


DEEPSPEED_CHECKS: Final[tuple[Check, ...]] = (check_keys, check_zero, check_batch, check_dtype, check_drivers)


def check_setting(setting: Setting, source: ConfigSource, context: Context) -> list[Finding]:
    """Everything that is wrong or odd in one JSON, worst first, then by line."""
    around = replace(context, setting=setting)
    findings = [finding for one in DEEPSPEED_CHECKS for finding in one(source, around)]
    return sorted(
        findings, key=lambda finding: (list(Severity).index(finding.severity), finding.message.params["line"])
    )


def require_usable(source: ConfigSource, context: Context) -> None:
    """Raises InputError `deepspeed.has_errors` for a JSON with an error, `deepspeed.drops_batches` for a version that loses gradients."""
    if context.setting is None:
        return
    errors = [one for one in check_setting(context.setting, source, context) if one.severity is Severity.ERROR]
    if errors:
        first = errors[0].message.params
        raise InputError(
            "deepspeed.has_errors", name=context.setting.name, count=len(errors), key=first["key"], line=first["line"]
        )
    dropping = [one for one in check_deepspeed(source, context) if one.code == "offload_drops"]
    if dropping:
        raise InputError("deepspeed.drops_batches", **dropping[0].message.params)


def _unknown(json: JsonObject, path: str, name: str, known: Mapping[str, Kind], *, is_fatal: bool) -> Finding:
    near = REPLACED.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
    severity = Severity.ERROR if is_fatal else Severity.WARNING
    code = "unknown_key" if is_fatal else "ignored_key"
    return _found(json, path, f"{code}_near" if near else code, severity, near=near or "")


def _automatic(json: JsonObject, path: str, kind: Kind) -> Iterator[Finding]:
    if path in AUTOMATIC or kind in ("any", "object"):
        return
    if "." in path:
        yield _found(json, path, "auto_is_default", Severity.WARNING)
    else:
        yield _found(json, path, "auto_stays", Severity.ERROR)


def _fits(value: Any, kind: Kind) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind in ("int", "number"):
        return _is_number(value) and (kind == "number" or value == int(value))
    return isinstance(value, _TYPES[kind]) or (kind == "object" and value is None)


def _found(json: JsonObject, path: str, code: str, severity: Severity, **params: object) -> Finding:
    line, column = json.place(path)
    return Finding(
        f"deepspeed_{code}", severity, message(f"deepspeed.checks.{code}", key=path, line=line, column=column, **params)
    )


def _section(json: JsonObject, path: str) -> Mapping[str, Any]:
    value: Any = json.values
    for name in path.split(".") if path else ():
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(kind: Kind) -> str:
    return " / ".join(kind) if isinstance(kind, tuple) else kind


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
