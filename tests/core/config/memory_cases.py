"""What an H100 took: peak of torch.cuda.max_memory_allocated in MiB, ZeRO-2, bf16, sdpa, dropout 0.1, accumulation 2, rank 64."""

from dataclasses import dataclass, field
from typing import Any

from core.config.memory.setup import Engine, Setup
from core.config.memory.shape import Shape, shape_of

SIZES: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "internlm2-1.8b": ("internlm2", 2048, 24, 16, 8, 8192, 92544),
    "internlm2-7b": ("internlm2", 4096, 32, 32, 8, 14336, 92544),
    "internlm2-20b": ("internlm2", 6144, 48, 48, 8, 16384, 92544),
    "llama3-8b": ("llama", 4096, 32, 32, 8, 14336, 128256),
}


def shape(name: str) -> Shape:
    kind, hidden, layers, heads, kv_heads, intermediate, vocabulary = SIZES[name]
    return shape_of(
        {
            "model_type": kind,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "vocab_size": vocabulary,
        }
    )


@dataclass(frozen=True)
class Measured:
    model: str
    mib: int
    setup: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model}-{'-'.join(str(value) for value in self.setup.values())}"


DEEPSPEED_0_16_ON_H100 = [
    Measured("internlm2-1.8b", 6882, {"method": "qlora", "length": 2048}),
    Measured("internlm2-1.8b", 9020, {"method": "lora", "length": 2048}),
    Measured("internlm2-1.8b", 12870, {"method": "qlora", "length": 2048, "is_checkpointing": False}),
    Measured("llama3-8b", 17071, {"method": "qlora", "length": 2048, "batch_size": 2}),
    Measured("internlm2-20b", 45104, {"method": "qlora", "length": 4096, "batch_size": 4}),
    Measured("internlm2-1.8b", 39702, {"method": "full", "length": 2048}),
    Measured("internlm2-1.8b", 40366, {"method": "full", "length": 2048, "batch_size": 4}),
]


XTUNER_ON_H100 = [
    # (model, MiB, setup): `python -m benchmarks memory`, XTuner's own runner, DeepSpeed 0.19.6, torch 2.11.
    ("internlm2-1.8b", 9991, {"method": "lora", "length": 1024}),
    ("internlm2-1.8b", 28469, {"method": "lora", "length": 1024, "batch_size": 4, "is_checkpointing": False}),
    ("internlm2-1.8b", 28440, {"method": "lora", "length": 4096, "is_checkpointing": False}),
    ("internlm2-1.8b", 29595, {"method": "lora", "length": 4096, "batch_size": 4}),
    ("internlm2-1.8b", 4976, {"method": "qlora", "length": 1024}),
    ("internlm2-1.8b", 25243, {"method": "qlora", "length": 1024, "batch_size": 4, "is_checkpointing": False}),
    ("internlm2-1.8b", 24578, {"method": "qlora", "length": 4096, "batch_size": 4}),
    ("internlm2-7b", 16078, {"method": "qlora", "length": 4096}),
    ("internlm2-7b", 16432, {"method": "qlora", "length": 1024, "batch_size": 4}),
    ("internlm2-7b", 34402, {"method": "lora", "length": 1024}),
    ("internlm2-1.8b", 36104, {"method": "full", "length": 4096, "weights": "float32"}),
    ("internlm2-1.8b", 4795, {"engine": Engine.DEEPSPEED, "method": "qlora", "length": 1024}),
    ("internlm2-1.8b", 23897, {"engine": Engine.DEEPSPEED, "method": "lora", "length": 4096, "batch_size": 4}),
    ("internlm2-1.8b", 39702, {"engine": Engine.DEEPSPEED, "method": "full", "length": 1024}),
    (
        "internlm2-1.8b",
        44098,
        {"engine": Engine.DEEPSPEED, "method": "full", "length": 1024, "batch_size": 4, "is_checkpointing": False},
    ),
    (
        "internlm2-1.8b",
        44101,
        {"engine": Engine.DEEPSPEED, "method": "full", "length": 4096, "is_checkpointing": False},
    ),
]


def deepspeed(**options: Any) -> Setup:
    common: dict[str, Any] = {"engine": Engine.DEEPSPEED, "stage": 2, "accumulation": 2, "weights": "bfloat16"}
    return Setup(**{**common, **options})


DRY_RUNS = [
    # (model, MiB beyond static memory at the worse of forward and backward, setup): tensors counted on fake devices, autocast to bf16.
    ("internlm2-1.8b", 7545, {"method": "lora", "length": 1024, "is_checkpointing": False}),
    ("internlm2-1.8b", 1663, {"method": "lora", "length": 1024}),
    ("internlm2-1.8b", 21269, {"method": "lora", "length": 4096, "batch_size": 4}),
    ("internlm2-1.8b", 18577, {"method": "lora", "length": 4096, "is_checkpointing": False, "dropout": 0.0}),
    ("internlm2-1.8b", 5845, {"method": "qlora", "length": 1024, "is_checkpointing": False}),
    ("internlm2-1.8b", 86272, {"method": "qlora", "length": 4096, "batch_size": 4, "is_checkpointing": False}),
    ("internlm2-7b", 23034, {"method": "lora", "length": 1024, "is_checkpointing": False}),
    ("internlm2-7b", 27270, {"method": "lora", "length": 4096, "batch_size": 4}),
    ("internlm2-7b", 46833, {"method": "qlora", "length": 4096, "is_checkpointing": False}),
    ("internlm2-7b", 7232, {"method": "qlora", "length": 4096}),
    ("llama3-8b", 9138, {"method": "qlora", "length": 2048, "batch_size": 2}),
    ("llama3-8b", 54730, {"method": "lora", "length": 2048, "batch_size": 2, "is_checkpointing": False}),
    ("internlm2-1.8b", 3801, {"method": "full", "length": 1024, "is_checkpointing": False, "weights": "bfloat16"}),
    ("internlm2-1.8b", 19142, {"method": "full", "length": 4096, "batch_size": 4, "weights": "bfloat16"}),
    ("internlm2-1.8b", 8457, {"method": "full", "length": 1024, "batch_size": 4, "weights": "float32"}),
    ("internlm2-1.8b", 68874, {"method": "full", "length": 4096, "batch_size": 4, "is_checkpointing": False}),
]
