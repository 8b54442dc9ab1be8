"""A Llama of any depth with random weights in shards, and a LoRA adapter for it: what the merge is measured with."""

import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np

_HIDDEN, _INTERMEDIATE, _VOCABULARY = 4096, 11008, 20000
_SHARDS: Final = 5
_RANK: Final = 64


def write_base(folder: Path, layers: int, tokenizer: Path) -> int:
    """A Llama in bfloat16 with random weights, in shards; returns its bytes."""
    from core.checkpoints.companions import copy_tokenizer
    from core.checkpoints.shards import write_shard
    from core.checkpoints.tensors import narrow

    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (_HIDDEN, _HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (_INTERMEDIATE, _HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (_HIDDEN, _INTERMEDIATE)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (_HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}
    random = np.random.default_rng(0)
    block = narrow((random.standard_normal(1 << 24) * 0.02).astype(np.float32), "BF16")
    names = list(shapes)
    place: dict[str, str] = {}
    for number in range(_SHARDS):
        group = names[number * len(names) // _SHARDS : (number + 1) * len(names) // _SHARDS]
        file = f"model-{number + 1:05d}-of-{_SHARDS:05d}.safetensors"
        values = (np.resize(block, shapes[name]) for name in group)
        write_shard(folder / file, {name: ("BF16", shapes[name]) for name in group}, values, {"format": "pt"})
        place |= dict.fromkeys(group, file)
    size = sum(int(np.prod(shape)) * 2 for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": place})
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "vocab_size": _VOCABULARY,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
    )
    copy_tokenizer(tokenizer, folder)
    os.sync()
    return size


def write_lora(folder: Path, base: Path, layers: int) -> None:
    """Rank 64 on every linear layer, as XTuner's own configs have it."""
    from core.checkpoints.shards import write_shard

    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    wide = {
        "gate_proj": (_INTERMEDIATE, _HIDDEN),
        "up_proj": (_INTERMEDIATE, _HIDDEN),
        "down_proj": (_HIDDEN, _INTERMEDIATE),
    }
    square = {f"{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for part, modules in (("self_attn", square), ("mlp", wide)):
            for name, (rows, columns) in modules.items():
                key = f"base_model.model.model.layers.{layer}.{part}.{name}"
                tensors[f"{key}.lora_A.weight"] = ("F32", (_RANK, columns))
                tensors[f"{key}.lora_B.weight"] = ("F32", (rows, _RANK))
    values = ((random.standard_normal(shape) * 0.01).astype(np.float32) for _, shape in tensors.values())
    write_shard(folder / "adapter_model.safetensors", tensors, values, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": 16,
        "target_modules": [*square, *wide],
        "base_model_name_or_path": str(base),
    }
    write_json(folder / "adapter_config.json", config)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")
