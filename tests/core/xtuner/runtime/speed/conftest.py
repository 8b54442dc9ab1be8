"""Tiny models under XTuner's own SupervisedFinetune, with adapters whose B is not zero, and packed rows for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models import VOCABULARY, write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2

WRITERS = {"internlm2": write_tiny_internlm2, "llama": write_tiny_llama, "qwen2": write_tiny_qwen2}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`build("llama", dropout=0.1)` → a SupervisedFinetune in fp32, in training mode."""
    import torch

    monkeypatch.setattr(torch.cpu, "is_bf16_supported", lambda: True, raising=False)  # XTuner asks, torch has no answer

    def make(family: str, *, dropout: float = 0.0, checkpointing: bool = False, **lora: Any) -> Any:
        from mmengine.config import ConfigDict
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM
        from xtuner.model import SupervisedFinetune

        folder = WRITERS[family](tmp_path / family)
        torch.manual_seed(1)
        options = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "task_type": "CAUSAL_LM", **lora}
        llm = {
            "type": AutoModelForCausalLM.from_pretrained,
            "pretrained_model_name_or_path": str(folder),
            "trust_remote_code": True,
            "torch_dtype": torch.float32,
            "attn_implementation": "sdpa",
        }
        model = SupervisedFinetune(
            llm=ConfigDict(llm), lora={"type": LoraConfig, **options}, use_activation_checkpointing=checkpointing
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.train()

    return make


def packed_batch(*rows: list[int], seed: int = 0, unlearned: float = 0.3) -> dict[str, Any]:
    """A micro-batch as `batches.collate` makes it: each row packed of samples of these lengths; a share of labels is ignored."""
    import torch

    from core.xtuner.runtime.speed.batches import collate

    generator = torch.Generator().manual_seed(seed)
    instances = []
    for lengths in rows:
        total = sum(lengths)
        ids = torch.randint(5, VOCABULARY, (total,), generator=generator)
        learned = torch.rand(total, generator=generator) > unlearned
        bounds = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
        instances.append(
            {
                "input_ids": ids.tolist(),
                "labels": torch.where(learned, ids, -100).tolist(),
                "cumulative_len": bounds,
            }
        )
    return dict(collate(instances)["data"])
