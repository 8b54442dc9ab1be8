"""Model folder → the same model with its linear layers in FP8 (E4M3), as compressed-tensors writes it and vLLM and transformers read it.

One scale an output row for the weights, activations scaled while the model runs ("FP8 dynamic"): no data is needed. Embedding, head, norms
and biases stay as they are. Formats: FP8 Formats for Deep Learning (arXiv 2209.05433); the compressed-tensors project.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from core.checkpoints.blocks import read_rows
from core.checkpoints.companions import copy_companions, describe, set_config
from core.checkpoints.gguf_layout import read_config
from core.checkpoints.lora import EMBEDDINGS, HEADS
from core.checkpoints.merge import read_description
from core.checkpoints.shards import INDEX, Shard, read_folder, write_shard
from core.checkpoints.staging import stage
from core.checkpoints.tensors import FLOATS, NUMPY_TYPES, Array, DiskTensor, is_finite, narrow, widen
from core.errors import InputError
from core.files import require_absent, require_space, write_json
from core.messages import message
from core.runs.job import Progress

ARCHITECTURES: Final = ("llama", "mistral", "qwen2", "qwen3", "internlm2")
"""Model types whose matrices are embedding, head, or weights of plain linear layers."""
_LARGEST: Final = np.float32(448)
"""Largest number of E4M3."""
_SMALLEST_SCALE: Final = np.float32(2.0**-100)
"""For a row of zeros, whose scale is only not to be zero."""
_BLOCK_ELEMENTS: Final = 1 << 21
Layout = dict[str, tuple[str, tuple[int, ...]]]


def export_fp8(model: str, target: str, *, progress: Progress) -> dict[str, Any]:
    """Write the model folder `target`. A job function; memory: the largest tensor in FP8, and a block.

    Returns {"path", "size_bytes", "converted", "weight_error"}. Raises InputError `checkpoints.fp8_architecture`,
    `checkpoints.quantized_base`, `checkpoints.not_finite`, and those of read_folder.
    """
    source, folder = Path(model), Path(target)
    require_absent(folder)
    config = read_config(source)
    if config.get("model_type") not in ARCHITECTURES:
        raise InputError(
            "checkpoints.fp8_architecture", architecture=str(config.get("model_type")), known=", ".join(ARCHITECTURES)
        )
    shards = read_folder(source)
    total = sum(shard.size_bytes for shard in shards)
    require_space(folder, total + 2**24)
    conversion = _Conversion(total, progress)
    described = read_description(source)
    place: dict[str, str] = {}
    with stage(folder, {"fp8": str(source), "at": source.stat().st_mtime}) as part:
        copy_companions(source, part)
        for shard in shards:
            layout = _layout(shard)
            write_shard(part / shard.safetensors_name, layout, conversion.values(shard), {"format": "pt"})
            place |= dict.fromkeys(layout, shard.safetensors_name)
        if len(shards) > 1:
            size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
            write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": place})
        head = "output" if config["model_type"] == "internlm2" else "lm_head"
        set_config(part, {"quantization_config": _quantization([head])})
        describe(
            part,
            kind="fp8",
            run=described.get("run"),
            checkpoint=described.get("checkpoint"),
            base_model=described.get("base_model"),
            prompt_template=described.get("prompt_template"),
            system=described.get("system"),
            dtype="F8_E4M3",
            details={"source": str(source), "weight_error": conversion.error},
        )
        size_bytes = sum(file.stat().st_size for file in part.iterdir())
    return {
        "path": str(folder),
        "size_bytes": size_bytes,
        "converted": conversion.count,
        "weight_error": conversion.error,
    }


class _Conversion:
    """Converts tensor after tensor; keeps the largest relative L2 error."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self.count, self.error = 0, 0.0

    def values(self, shard: Shard) -> Iterator[Array]:
        """The tensors of the new file, a scale after its weight."""
        for name, tensor in shard.tensors.items():
            if _is_converted(name, tensor):
                yield from self._convert(name, tensor)
            else:
                yield tensor.read()
            self._done += tensor.nbytes
            self._progress.update(self._done, self._total, message("checkpoints.progress.fp8"), unit="bytes")

    def _convert(self, name: str, tensor: DiskTensor) -> Iterator[Array]:
        import torch

        rows, width = tensor.shape
        bits = np.empty((rows, width), dtype=NUMPY_TYPES["F8_E4M3"])
        scales = np.empty((rows, 1), dtype=NUMPY_TYPES[tensor.dtype])
        lost = whole = 0.0
        for row, raw in read_rows(tensor, rows, width, max(1, _BLOCK_ELEMENTS // width)):
            if not is_finite(raw, tensor.dtype):
                raise InputError("checkpoints.not_finite", path=str(tensor.file), name=name)
            values = widen(raw, tensor.dtype).reshape(-1, width)
            end = row + len(values)
            scale = np.maximum(np.abs(values).max(axis=1, keepdims=True) / _LARGEST, _SMALLEST_SCALE)
            scales[row:end] = narrow(scale, tensor.dtype)
            scale = np.maximum(widen(scales[row:end], tensor.dtype), _SMALLEST_SCALE)
            small = torch.from_numpy(np.clip(values / scale, -_LARGEST, _LARGEST)).to(torch.float8_e4m3fn)
            bits[row:end] = small.view(torch.uint8).numpy()
            lost += float(np.square(values - small.float().numpy() * scale).sum(dtype=np.float64))
            whole += float(np.square(values).sum(dtype=np.float64))
            self._progress.check()
        self.count += 1
        self.error = max(self.error, (lost / whole) ** 0.5 if whole else 0.0)
        yield bits
        yield scales


def _layout(shard: Shard) -> Layout:
    layout: Layout = {}
    for name, tensor in shard.tensors.items():
        if _is_converted(name, tensor):
            layout[name] = ("F8_E4M3", tensor.shape)
            layout[f"{name}_scale"] = (tensor.dtype, (tensor.shape[0], 1))
        else:
            layout[name] = (tensor.dtype, tensor.shape)
    return layout


def _is_converted(name: str, tensor: DiskTensor) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    is_matrix = len(tensor.shape) == 2 and tensor.dtype in FLOATS and name.endswith(".weight")
    return is_matrix and module not in (*EMBEDDINGS, *HEADS)


def _quantization(ignored: list[str]) -> Mapping[str, Any]:
    """config.json's quantization_config, as compressed-tensors writes it."""
    plain = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
    }
    weights = {**plain, "strategy": "channel", "dynamic": False, "observer": "minmax", "observer_kwargs": {}}
    activations = {**plain, "strategy": "token", "dynamic": True, "observer": None, "observer_kwargs": {}}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {"group_0": group},
    }
