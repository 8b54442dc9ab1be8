"""Rounds a tiny model to 4 bits and packs it, as plain as can be: what the quantiser would leave, made without it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.shards import read_folder, write_shard
from core.checkpoints.tensors import narrow, widen
from core.quantize.plan import fitting_group, matrices

Change = Callable[[dict[str, NDArray[np.float32]]], None]


def write_packed(source: Path, target: Path, change: Change = lambda _values: None) -> Path:
    """The folder `target` with what `change` makes of the weights of `source`, rounded to the nearest, and a config."""
    target.mkdir(parents=True, exist_ok=True)
    shards = read_folder(source)
    chosen = matrices(shards)
    group = fitting_group(chosen)
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    values = {name: widen(tensor.read(), tensor.dtype).copy() for name, tensor in tensors.items()}
    change(values)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    written = []
    for name, value in values.items():
        dtype = tensors[name].dtype
        if name not in chosen:
            layout[name] = (dtype, value.shape)
            written.append(narrow(value, dtype))
            continue
        rows, width = value.shape
        scales = narrow(np.abs(value.reshape(rows, -1, group)).max(axis=2) / np.float32(7), dtype)
        steps = np.maximum(widen(scales, dtype), np.float32(1e-12))
        numbers = np.clip(np.rint(value.reshape(rows, -1, group) / steps[:, :, None]), -8, 7).reshape(rows, -1, 8)
        packed = np.zeros((rows, width // 8), dtype=np.uint32)
        for place in range(8):
            packed |= (numbers[:, :, place] + 8).astype(np.uint32) << np.uint32(4 * place)
        layout |= {
            f"{name}_packed": ("I32", packed.shape),
            f"{name}_scale": (dtype, scales.shape),
            f"{name}_shape": ("I64", (2,)),
        }
        written += [packed.view(np.int32), scales, np.array([rows, width], dtype=np.int64)]
    write_shard(target / "model.safetensors", layout, written, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return target
