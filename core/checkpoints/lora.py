"""What a PEFT adapter does to each tensor of a base model, and the arithmetic of it. Knows shapes and formulas; writes no file.

W' = W + s·B·A with s = alpha/r, or alpha/√r for rsLoRA (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732); DoRA (arXiv 2402.09353):
W' = m / ‖W + s·B·A‖ · (W + s·B·A), norms over each output's row. All in float32; the caller rounds once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.adapter import CONFIG, WEIGHTS
from core.checkpoints.shards import read_shard
from core.checkpoints.tensors import FLOATS, DiskTensor, is_finite, widen
from core.errors import InputError
from core.files import read_json

_PREFIX: Final = "base_model.model."
_UNDERSTOOD: Final = frozenset(
    (
        "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_bias", "use_dora",
        "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
        "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "runtime_config",
        "megatron_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "lora_ga_config",
    )
)  # fmt: skip
"""Keys of adapter_config.json whose meaning is known here, or that say only how the training began. Any other one that is set (peft gains
some with each release) may change the arithmetic, so it is refused."""
_MUTATING_INITS: Final = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that change the base weights themselves: the base on disk is not the one that was trained on."""
EMBEDDINGS: Final = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings")
HEADS: Final = ("lm_head", "output")


@dataclass(frozen=True, slots=True)
class Pair:
    """One low-rank update of one tensor."""

    a: DiskTensor
    """r × in (embedding: r × vocabulary)."""
    b: DiskTensor
    """out × r (embedding: width × r)."""
    scale: float
    is_transposed: bool
    """The base tensor is in × out (fan_in_fan_out, embeddings): add (B·A)ᵀ."""
    magnitude: DiskTensor | None = None
    """DoRA's m, one an output."""

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.b.shape[0], self.a.shape[1])
        return (shape[1], shape[0]) if self.is_transposed else shape


@dataclass(slots=True)
class Change:
    """All that happens to one tensor of the base."""

    pairs: list[Pair] = field(default_factory=list)
    additions: list[tuple[DiskTensor, float]] = field(default_factory=list)
    """Added as they are, times a factor (bias of lora_B)."""
    replacement: DiskTensor | None = None
    """Put in its place (modules_to_save, trained biases)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened PEFT folder."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, DiskTensor]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes by the name of the base's tensor, and tensors that come new (a head that was tied)."""

    changes: dict[str, Change]
    untied: dict[str, str] = field(default_factory=dict)
    """New tensor → the base tensor whose values it starts from."""


def open_adapter(folder: Path, weight: float = 1.0) -> Adapter:
    """Raises InputError `checkpoints.not_adapter`, `checkpoints.unsupported_adapter`, `checkpoints.not_finite`, `checkpoints.truncated`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError("checkpoints.not_adapter", path=str(folder))
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise InputError("checkpoints.unsupported_adapter", path=str(folder), feature=str(config.get("peft_type")))
    for feature in sorted(config.keys() - _UNDERSTOOD):
        if config[feature]:
            raise InputError("checkpoints.unsupported_adapter", path=str(folder), feature=feature)
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_MUTATING_INITS):
        raise InputError("checkpoints.unsupported_adapter", path=str(folder), feature=f"init_lora_weights={init}")
    tensors = read_shard(folder / WEIGHTS).tensors
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise InputError("checkpoints.unsupported_adapter", path=str(folder), feature=f"{name}: {tensor.dtype}")
        if not is_finite(tensor.read(), tensor.dtype):
            raise InputError("checkpoints.not_finite", path=str(folder / WEIGHTS), name=name)
    return Adapter(folder, config, tensors, weight)


def plan_changes(adapters: Sequence[Adapter], base: Mapping[str, DiskTensor], *, is_tied: bool) -> Plan:
    """Which tensor of the base changes how. Every key of every adapter must find its place and fit.

    Raises InputError `checkpoints.unused_keys`, `checkpoints.shape_differs`, `checkpoints.cannot_combine`.
    """
    names = dict(base)
    untied: dict[str, str] = {}
    if is_tied:
        untied = _heads_to_untie(adapters, base)
        names |= {head: base[source] for head, source in untied.items()}
    changes: dict[str, Change] = {}
    for adapter in adapters:
        _add(adapter, names, changes)
    if len(adapters) > 1:
        _check_combination(changes)
    for name, change in changes.items():
        for shape in [pair.shape for pair in change.pairs] + [tensor.shape for tensor, _ in change.additions]:
            _require_shape(name, names[name].shape, shape)
        if change.replacement is not None:
            _require_shape(name, names[name].shape, change.replacement.shape)
    return Plan(changes, untied)


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """alpha/r (rsLoRA: alpha/√r) of `module`, with peft's patterns: the first key that the module's name ends with."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(frozen=True, slots=True)
class LoadedPair:
    """left · right is the update in the base tensor's own layout; the scale is in the smaller factor."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]


def load_pair(pair: Pair) -> LoadedPair:
    a, b = widen(pair.a.read(), pair.a.dtype), widen(pair.b.read(), pair.b.dtype)
    left, right = (a.T, b.T) if pair.is_transposed else (b, a)
    return LoadedPair(np.ascontiguousarray(left) * np.float32(pair.scale), np.ascontiguousarray(right))


def _add(adapter: Adapter, names: Mapping[str, DiskTensor], changes: dict[str, Change]) -> None:
    """Enter one adapter's tensors into `changes`; every key is used or it is an error."""
    left = dict(adapter.tensors)
    is_transposed = bool(adapter.config.get("fan_in_fan_out"))
    for key in list(left):
        module, part = split_key(key)
        if part in ("lora_A.weight", "lora_embedding_A"):
            is_embedding = part == "lora_embedding_A"
            other = "lora_embedding_B" if is_embedding else "lora_B.weight"
            place = _find(f"{module}.weight", names)
            b = adapter.tensors.get(key.removesuffix(part) + other)
            if place is None or b is None:
                continue
            scale = scale_of(adapter.config, module) * adapter.weight
            magnitude = adapter.tensors.get(key.removesuffix(part) + "lora_magnitude_vector")
            pair = Pair(adapter.tensors[key], b, scale, is_embedding or is_transposed, magnitude)
            if pair.a.shape[0] != pair.b.shape[1]:
                raise InputError(
                    "checkpoints.shape_differs", name=key, base=str(pair.a.shape), adapter=str(pair.b.shape)
                )
            changes.setdefault(place, Change()).pairs.append(pair)
            for used in (part, other, "lora_magnitude_vector"):
                left.pop(key.removesuffix(part) + used, None)
        elif part == "lora_B.bias" and (place := _find(f"{module}.bias", names)):
            addition = (left.pop(key), scale_of(adapter.config, module) * adapter.weight)
            changes.setdefault(place, Change()).additions.append(addition)
        elif not part and (place := _find(module, names)):
            changes.setdefault(place, Change()).replacement = left.pop(key)
    if left:
        shown = ", ".join(sorted(left)[:5]) + (" …" if len(left) > 5 else "")
        raise InputError("checkpoints.unused_keys", path=str(adapter.folder), count=len(left), names=shown)


def split_key(key: str) -> tuple[str, str]:
    """`base_model.model.X.lora_A.weight` → (X, "lora_A.weight"); a plain tensor → (its name, "")."""
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    match = re.search(r"\.(lora_\w+(?:\.\w+)?)$", name)
    return (name[: match.start()], match[1]) if match else (name, "")


def _find(name: str, base: Mapping[str, DiskTensor]) -> str | None:
    """The base's name for `name`: bases saved without their head lack the leading `model.`."""
    short = name.removeprefix("model.")
    return next((candidate for candidate in (name, short, f"model.{name}") if candidate in base), None)


def _heads_to_untie(adapters: Sequence[Adapter], base: Mapping[str, DiskTensor]) -> dict[str, str]:
    """A tied head that the training made differ from the embedding gets its own tensor, as the training computed it."""
    modules = {split_key(key)[0].removesuffix(".weight") for adapter in adapters for key in adapter.tensors}
    touched = any(module.rpartition(".")[2] in (*EMBEDDINGS, *HEADS) for module in modules)
    source = next((name for name in base if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS), None)
    if not touched or source is None:
        return {}
    head = "output.weight" if "tok_embeddings" in source else "lm_head.weight"
    return {} if head in base else {head: source}


def _check_combination(changes: Mapping[str, Change]) -> None:
    for name, change in changes.items():
        if any(pair.magnitude is not None for pair in change.pairs):
            raise InputError("checkpoints.cannot_combine", feature="DoRA", name=name)
        if change.replacement is not None:
            raise InputError("checkpoints.cannot_combine", feature="modules_to_save", name=name)


def _pattern(table: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _require_shape(name: str, base: tuple[int, ...], adapter: tuple[int, ...]) -> None:
    if tuple(base) != tuple(adapter):
        raise InputError("checkpoints.shape_differs", name=name, base=str(base), adapter=str(adapter))
