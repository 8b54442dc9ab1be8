"""Training checkpoint → PEFT adapter folder.

Reads the adapter's bytes and nothing else: no model, no base weights, no optimizer moments.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from core.checkpoints.companions import copy_tokenizer, describe, write_chat_template
from core.checkpoints.recipe import Recipe, read_recipe
from core.checkpoints.shards import Readable, write_shard
from core.checkpoints.staging import stage
from core.checkpoints.tensors import FLOATS, Array, convert, is_finite
from core.checkpoints.weights import Checkpoint, open_checkpoint
from core.errors import InputError
from core.files import require_absent, require_space, write_json
from core.messages import message
from core.runs.job import Progress

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
_NAME: Final = "default"
_LORA_PARTS: Final = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.")
_DEFAULTS: Final[dict[str, Any]] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "lora_alpha": None,
    "lora_bias": False, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": None, "rank_pattern": {},
    "revision": None, "target_modules": None, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip


def export_adapter(
    checkpoint: str,
    target: str,
    *,
    base_model: str | None = None,
    dtype: str = "keep",
    progress: Progress,
) -> dict[str, Any]:
    """Write the PEFT folder `target` from `checkpoint` (file or DeepSpeed folder of any stage and world size).

    `dtype`: "keep" (as trained), "F32", "F16" or "BF16". Under ZeRO, "F32" and "F16" come from the optimizer's float32 copies.
    Returns {"path", "size_bytes", "dtype", "tensors"}. Raises InputError: `checkpoints.full_not_adapter`,
    `checkpoints.no_lora_values`, `checkpoints.not_language_model`, `checkpoints.not_finite`, and those of open_checkpoint.
    """
    source = Path(checkpoint)
    opened = open_checkpoint(source)
    recipe = read_recipe(source, opened.meta)
    tensors = {peft_name(name): tensor for name, tensor in choose_weights(opened, dtype).items()}
    config = adapter_config(recipe, tensors, source, base_model)
    types = {name: target_dtype(tensor.dtype, dtype) for name, tensor in tensors.items()}
    folder = Path(target)
    require_absent(folder)
    total = sum(tensor.nbytes for tensor in tensors.values())
    require_space(folder, total * (2 if dtype == "F32" else 1) + 2**24)
    with stage(folder, {"adapter": str(source), "at": source.stat().st_mtime, "dtype": dtype}) as part:
        layout = {name: (types[name], tensor.shape) for name, tensor in sorted(tensors.items())}
        values = _read_all(source, tensors, types, total, progress)
        size_bytes = write_shard(part / WEIGHTS, layout, values, {"format": "pt"})
        write_json(part / CONFIG, config)
        base = local_folder(config["base_model_name_or_path"])
        if base is not None:
            copy_tokenizer(base, part)
            write_chat_template(part, recipe.prompt_template)
        written = max(set(types.values()), key=list(types.values()).count)
        describe(
            part,
            kind="adapter",
            run=recipe.run,
            checkpoint=source.name.removesuffix(".pth"),
            base_model={"path": config["base_model_name_or_path"], "fingerprint": recipe.base_fingerprint},
            prompt_template=recipe.prompt_template,
            system=recipe.system,
            dtype=written,
        )
    return {"path": str(folder), "size_bytes": size_bytes, "dtype": written, "tensors": len(tensors)}


def choose_weights(opened: Checkpoint, dtype: str) -> dict[str, Readable]:
    """As trained, or the optimizer's float32 copies where another precision than the trained one is asked for."""
    if dtype not in ("keep", *FLOATS):
        raise InputError("checkpoints.bad_dtype", dtype=dtype)
    if dtype in ("keep", "BF16") or not opened.masters:
        return opened.weights
    return {**opened.weights, **opened.masters}


def target_dtype(stored: str, wanted: str) -> str:
    return wanted if wanted != "keep" and stored in (*FLOATS, "F64") else stored


def peft_name(name: str) -> str:
    """XTuner's name → the one in a PEFT file: no `llm.`, no adapter name, modules_to_save under their own name."""
    if not name.startswith("llm."):
        raise InputError("checkpoints.not_language_model", name=name)
    name = name.removeprefix("llm.").replace(f".modules_to_save.{_NAME}.", ".")
    if name.endswith(f".lora_magnitude_vector.{_NAME}.weight"):
        return name.removesuffix(f".{_NAME}.weight")
    return re.sub(rf"\.(lora_\w+)\.{_NAME}(\.|$)", r".\1\2", name)


def adapter_config(
    recipe: Recipe, tensors: Mapping[str, Readable], source: Path, base_model: str | None
) -> dict[str, Any]:
    """adapter_config.json: the config's LoRA values, checked against the shapes of the tensors."""
    targets = sorted(
        {_LORA_PARTS.split(name + ".", maxsplit=1)[0].rpartition(".")[2] for name in tensors if _is_lora(name)}
    )
    if not targets:
        raise InputError("checkpoints.full_not_adapter", path=str(source))
    lora = recipe.lora or {}
    if not isinstance(lora.get("lora_alpha"), int | float):
        raise InputError("checkpoints.no_lora_values", path=str(source))
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name or ".lora_embedding_A" in name}
    rank = lora.get("r", 8)
    if not isinstance(rank, int) or (not lora.get("rank_pattern") and ranks != {rank}):
        raise InputError(
            "checkpoints.rank_differs", path=str(source), rank=rank, found=", ".join(map(str, sorted(ranks)))
        )
    config = {**_DEFAULTS, **lora, "r": rank, "base_model_name_or_path": base_model or recipe.base_model}
    config["target_modules"] = config["target_modules"] or targets
    return config


def local_folder(path: str | None) -> Path | None:
    """`path` if it is a model folder on this machine; None for a hub name."""
    return Path(path) if path and (Path(path) / "config.json").is_file() else None


def _is_lora(name: str) -> bool:
    return bool(_LORA_PARTS.search(name + "."))


def _read_all(
    source: Path, tensors: Mapping[str, Readable], types: Mapping[str, str], total: int, progress: Progress
) -> Any:
    done = 0
    for name, tensor in sorted(tensors.items()):
        values: Array = convert(tensor.read(), tensor.dtype, types[name])
        if not is_finite(values, types[name]):
            raise InputError("checkpoints.not_finite", path=str(source), name=name)
        yield values
        done += tensor.nbytes
        progress.update(done, total, message("checkpoints.progress.adapter"), unit="bytes")
