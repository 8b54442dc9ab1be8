"""Base model + adapters → merged model, shard by shard: no model is built, memory stays small and constant.

Each output shard has its base shard's name and header; `writer` fills it, `blocks` does the arithmetic.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoints.blocks import changed_blocks
from core.checkpoints.companions import copy_companions, describe, set_config, write_chat_template
from core.checkpoints.gpu_blocks import CPU, GpuBlocks
from core.checkpoints.lora import Plan, open_adapter, plan_changes
from core.checkpoints.shards import INDEX, Shard, make_header, read_folder
from core.checkpoints.staging import left_bytes, stage
from core.checkpoints.tensors import FLOATS
from core.checkpoints.writer import Arithmetic, FilePlan, Output, Writer
from core.errors import DanluError, InputError
from core.files import read_json, require_absent, require_space, write_json
from core.runs.job import Progress


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything checked, nothing written."""

    base: Path
    shards: list[tuple[Shard, dict[str, str]]]
    """Base shard, and tensors that it gets in addition (new name → source)."""
    plan: Plan
    dtype: str

    @property
    def size_bytes(self) -> int:
        extra = sum(shard.tensors[source].nbytes for shard, new in self.shards for source in new.values())
        return sum(shard.size_bytes for shard, _ in self.shards) + extra


def merge_adapter(
    base_model: str,
    adapters: Sequence[str],
    target: str,
    *,
    weights: Sequence[float] | None = None,
    device: str = CPU,
    progress: Progress,
) -> dict[str, Any]:
    """Write the merged model `target`. Several adapters are summed, each times its weight (default 1). `device`: gpu_blocks.CPU or CUDA.

    Returns {"path", "size_bytes", "changed", "tensors", "dtype"}. Raises DanluError before anything is written for a base or adapter that
    does not fit and for a GPU that is not there; `checkpoints.not_finite`, `checkpoints.overflow` if a result is NaN or infinite,
    `checkpoints.gpu_memory`: then nothing is left.
    """
    folder = Path(target)
    require_absent(folder)
    merge = plan_merge(Path(base_model), [Path(adapter) for adapter in adapters], weights)
    require_space(folder, merge.size_bytes + 2**24 - left_bytes(folder))
    arithmetic = changed_blocks if device == CPU else GpuBlocks(device)
    first = read_description(Path(adapters[0]))
    with stage(folder, _identity(merge, adapters, weights, device)) as part:
        _write_shards(merge, part, arithmetic, progress)
        copy_companions(merge.base, part)
        _write_index(merge, part)
        write_chat_template(part, first.get("prompt_template"))
        if merge.plan.untied:
            set_config(part, {"tie_word_embeddings": False})
        recorded = first.get("base_model") or {}
        describe(
            part,
            kind="merged",
            run=first.get("run") if len(adapters) == 1 else None,
            checkpoint=first.get("checkpoint") if len(adapters) == 1 else None,
            base_model={"path": str(merge.base), "fingerprint": recorded.get("fingerprint")},
            prompt_template=first.get("prompt_template"),
            system=first.get("system"),
            dtype=merge.dtype,
            details={
                "adapters": [{"path": str(path), "weight": _weight(weights, n)} for n, path in enumerate(adapters)],
                "device": device,
            },
        )
    tensors = sum(len(shard.tensors) for shard, _ in merge.shards)
    return {
        "path": str(folder),
        "size_bytes": merge.size_bytes,
        "changed": len(merge.plan.changes),
        "tensors": tensors,
        "dtype": merge.dtype,
    }


def plan_merge(base: Path, adapters: Sequence[Path], weights: Sequence[float] | None = None) -> MergePlan:
    """Read headers and the adapters, check that they belong together. Raises InputError, among them `checkpoints.quantized_base`."""
    if not (base / "config.json").is_file():
        raise InputError("checkpoints.no_base", path=str(base))
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise InputError("checkpoints.quantized_base", path=str(base))
    shards = read_folder(base)
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    opened = [open_adapter(folder, _weight(weights, number)) for number, folder in enumerate(adapters)]
    plan = plan_changes(opened, tensors, is_tied=bool(config.get("tie_word_embeddings")))
    for name in plan.changes:
        stored = tensors[plan.untied.get(name, name)].dtype
        if stored not in FLOATS:
            raise InputError("checkpoints.quantized_base", path=f"{base}: {name} {stored}")
    kinds = [tensor.dtype for tensor in tensors.values()]
    placed = [(shard, {new: old for new, old in plan.untied.items() if old in shard.tensors}) for shard in shards]
    return MergePlan(base, placed, plan, max(set(kinds), key=kinds.count))


def _write_shards(merge: MergePlan, part: Path, arithmetic: Arithmetic, progress: Progress) -> None:
    with Writer(merge.size_bytes, progress, arithmetic) as writer:
        for shard, new in merge.shards:
            writer.write(_plan_file(shard, new, merge.plan, part / shard.safetensors_name))


def _plan_file(shard: Shard, new: Mapping[str, str], plan: Plan, file: Path) -> FilePlan:
    """The base's header byte for byte, unless tensors are added."""
    sources = {**shard.tensors, **{name: shard.tensors[old] for name, old in new.items()}}
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in sources.items()}
    header = make_header(layout, shard.metadata) if new else shard.header_bytes
    outputs, offset = [], len(header)
    for name, tensor in sources.items():
        outputs.append(Output(name, tensor, offset, plan.changes.get(name)))
        offset += tensor.nbytes
    return FilePlan(file, header, outputs)


def _write_index(merge: MergePlan, part: Path) -> None:
    """The base's index, byte for byte unless tensors were added or the base's files are torch's."""
    index_file = merge.base / INDEX
    has_index = index_file.exists()
    if has_index and not merge.plan.untied:
        (part / INDEX).write_bytes(index_file.read_bytes())
        return
    if not has_index and len(merge.shards) == 1 and merge.shards[0][0].safetensors_name == "model.safetensors":
        return
    index = read_json(index_file) if has_index else {}
    size = sum(t.nbytes for s, n in merge.shards for t in [*s.tensors.values(), *(s.tensors[o] for o in n.values())])
    place = {name: shard.safetensors_name for shard, new in merge.shards for name in [*shard.tensors, *new]}
    metadata = {**index.get("metadata", {}), "total_size": size}
    write_json(part / INDEX, {**index, "metadata": metadata, "weight_map": {**index.get("weight_map", {}), **place}})


def _identity(
    merge: MergePlan, adapters: Sequence[str], weights: Sequence[float] | None, device: str
) -> dict[str, Any]:
    """What a killed merge must have in common with this one to go on in its folder."""
    files = [shard.file for shard, _ in merge.shards] + [
        Path(folder) / "adapter_model.safetensors" for folder in adapters
    ]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = repr((stats, list(weights or []), device))
    return {"merge": hashlib.sha256(text.encode()).hexdigest()}


def read_description(adapter: Path) -> dict[str, Any]:
    """danlu.json of an adapter; empty for one that was made elsewhere."""
    try:
        value = read_json(adapter / "danlu.json")
    except DanluError:
        return {}
    return value if isinstance(value, dict) else {}


def _weight(weights: Sequence[float] | None, number: int) -> float:
    return float(weights[number]) if weights else 1.0
