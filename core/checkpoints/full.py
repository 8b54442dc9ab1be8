"""Training checkpoint of a full fine-tune → Hugging Face folder with sharded safetensors, one tensor in memory at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from core.checkpoints.adapter import choose_weights, local_folder, target_dtype
from core.checkpoints.companions import copy_companions, describe, set_config, write_chat_template
from core.checkpoints.recipe import read_recipe
from core.checkpoints.shards import INDEX, Readable, write_shard
from core.checkpoints.staging import stage
from core.checkpoints.tensors import DTYPE_NAMES, NUMPY_TYPES, Array, convert, is_finite
from core.checkpoints.weights import open_checkpoint
from core.errors import InputError
from core.files import read_json, require_absent, require_space, write_json
from core.messages import message
from core.runs.job import Progress

SHARD_BYTES: Final = 5 * 2**30


def export_full(
    checkpoint: str,
    target: str,
    *,
    base_model: str | None = None,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress,
) -> dict[str, Any]:
    """Write the model folder `target` from a full fine-tune's `checkpoint`; config, tokenizer and code come from the base model.

    Returns {"path", "size_bytes", "dtype", "tensors"}. Raises InputError `checkpoints.adapter_not_full`, `checkpoints.no_base`, and
    those of open_checkpoint.
    """
    source, folder = Path(checkpoint), Path(target)
    opened = open_checkpoint(source)
    recipe = read_recipe(source, opened.meta)
    base = local_folder(base_model or recipe.base_model)
    if base is None:
        raise InputError("checkpoints.no_base", path=str(base_model or recipe.base_model))
    tensors = _language_model(choose_weights(opened, dtype), source)
    if read_json(base / "config.json").get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    types = {name: target_dtype(tensor.dtype, dtype) for name, tensor in tensors.items()}
    require_absent(folder)
    groups = _split(tensors, types, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    require_space(folder, sum(size for _, size in groups) + 2**24)
    written = max(set(types.values()), key=list(types.values()).count)
    with stage(folder, {"full": str(source), "at": source.stat().st_mtime, "dtype": dtype}) as part:
        size_bytes = _write(part, groups, tensors, types, _Reader(source, total, progress))
        copy_companions(base, part)
        write_chat_template(part, recipe.prompt_template)
        set_config(part, {"torch_dtype": DTYPE_NAMES.get(written, "float32"), "use_cache": True})
        describe(
            part,
            kind="full",
            run=recipe.run,
            checkpoint=source.name.removesuffix(".pth"),
            base_model={"path": str(base), "fingerprint": recipe.base_fingerprint},
            prompt_template=recipe.prompt_template,
            system=recipe.system,
            dtype=written,
        )
    return {"path": str(folder), "size_bytes": size_bytes, "dtype": written, "tensors": len(tensors)}


class _Reader:
    """Reads tensors, checks them, counts bytes."""

    def __init__(self, source: Path, total: int, progress: Progress) -> None:
        self._source, self._total, self._progress, self._done = source, total, progress, 0

    def values(self, names: list[str], tensors: Mapping[str, Readable], types: Mapping[str, str]) -> Iterator[Array]:
        for name in names:
            value = convert(tensors[name].read(), tensors[name].dtype, types[name])
            if not is_finite(value, types[name]):
                raise InputError("checkpoints.not_finite", path=str(self._source), name=name)
            yield value
            self._done += tensors[name].nbytes
            self._progress.update(self._done, self._total, message("checkpoints.progress.full"), unit="bytes")


def _language_model(tensors: Mapping[str, Readable], source: Path) -> dict[str, Readable]:
    if any(".lora_" in name for name in tensors):
        raise InputError("checkpoints.adapter_not_full", path=str(source))
    for name in tensors:
        if not name.startswith("llm."):
            raise InputError("checkpoints.not_language_model", name=name)
    return {name.removeprefix("llm."): tensor for name, tensor in tensors.items()}


def _split(tensors: Mapping[str, Readable], types: Mapping[str, str], limit: int) -> list[tuple[list[str], int]]:
    """Names in order, cut into shards of at most `limit` bytes (a larger tensor gets its own)."""
    groups: list[tuple[list[str], int]] = []
    for name, tensor in tensors.items():
        size = tensor.nbytes // NUMPY_TYPES[tensor.dtype].itemsize * NUMPY_TYPES[types[name]].itemsize
        if not groups or groups[-1][1] + size > limit:
            groups.append(([], 0))
        names, held = groups[-1]
        groups[-1] = ([*names, name], held + size)
    return groups


def _write(
    part: Path,
    groups: list[tuple[list[str], int]],
    tensors: Mapping[str, Readable],
    types: Mapping[str, str],
    reader: _Reader,
) -> int:
    count, size_bytes = len(groups), 0
    place: dict[str, str] = {}
    for number, (names, size) in enumerate(groups, start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        layout = {name: (types[name], tensors[name].shape) for name in names}
        write_shard(part / file, layout, reader.values(names, tensors, types), {"format": "pt"})
        place |= dict.fromkeys(names, file)
        size_bytes += size
    if count > 1:
        write_json(part / INDEX, {"metadata": {"total_size": size_bytes}, "weight_map": place})
    return size_bytes
