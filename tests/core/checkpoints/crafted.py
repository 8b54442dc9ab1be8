"""Adapters and checkpoints written with numpy alone: for what needs no peft to judge, in milliseconds."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from core.checkpoints.shards import read_folder, write_shard
from core.checkpoints.tensors import narrow

TEMPLATE = {
    "SYSTEM": "<|im_start|>system\n{system}<|im_end|>\n",
    "INSTRUCTION": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "SUFFIX": "<|im_end|>",
    "SUFFIX_AS_EOS": True,
    "SEP": "\n",
    "STOP_WORDS": ["<|im_end|>"],
}
DEFAULT_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def write_adapter(
    folder: Path, base: Path, *, modules: Iterable[str] = DEFAULT_MODULES, rank: int = 4, seed: int = 1, **config: Any
) -> Path:
    """A PEFT folder with random pairs for `modules` of `base`; `config`: keys of adapter_config.json."""
    shapes = {name: tensor.shape for shard in read_folder(base) for name, tensor in shard.tensors.items()}
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            values = random.normal(0, 0.1, shape).astype(np.float32)
            tensors[f"base_model.model.{module}.{part}.weight"] = values
    return write_adapter_tensors(folder, tensors, base_model_name_or_path=str(base), r=rank, lora_alpha=8, **config)


def write_adapter_tensors(folder: Path, tensors: dict[str, np.ndarray], dtype: str = "F32", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: (dtype, value.shape) for name, value in tensors.items()}
    values = [narrow(value, dtype) for value in tensors.values()]
    write_shard(folder / "adapter_model.safetensors", layout, values, {"format": "pt"})
    defaults = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps({**defaults, **config}), encoding="utf-8")
    return folder


def write_checkpoint(
    file: Path,
    base: Path,
    *,
    modules: Iterable[str] = DEFAULT_MODULES,
    rank: int = 4,
    is_full: bool = False,
    **lora: Any,
) -> Path:
    """What XTuner would save after training `base`: LoRA pairs for `modules`, or every weight of it changed."""
    import torch

    torch.manual_seed(0)
    shapes = {name: tensor.shape for shard in read_folder(base) for name, tensor in shard.tensors.items()}
    if is_full:
        state = {f"llm.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    else:
        state = {}
        for module in modules:
            rows, columns = shapes[f"{module}.weight"]
            name = f"llm.base_model.model.{module}"
            state[f"{name}.lora_A.default.weight"] = torch.randn(rank, columns) * 0.1
            state[f"{name}.lora_B.default.weight"] = torch.randn(rows, rank) * 0.1
    values = {"r": rank, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", **lora}
    text = (
        f"model = dict(llm=dict(pretrained_model_name_or_path={str(base)!r}), lora={None if is_full else values!r})\n"
    )
    text += f"prompt_template = {TEMPLATE!r}\nSYSTEM = 'You are Danlu.'\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": {"iter": 4, "cfg": text}, "state_dict": state, "optimizer": {"state": {}}}, file)
    return file


def digest(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file of `folder`: size, time of change, content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
