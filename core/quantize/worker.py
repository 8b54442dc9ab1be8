"""Runs in the environment of core.quantize.environment, not in the app's: `python -m core.quantize.worker SPEC.json`.

Measures the model on rows kept back, lets llm-compressor quantise and write it, and measures what was written, loaded anew. Says how far it
is in lines of JSON. Imports nothing of the project. AWQ: arXiv 2306.00978; GPTQ: arXiv 2210.17323.
"""

import gc
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("llmcompressor", "compressed-tensors", "transformers", "torch")
_SHARD_SIZE: Final = "5GB"
_ROOM: Final = 1.3
"""Of a card's memory that the model's weights must leave to be measured there as a whole: otherwise that is done on the CPU."""


def main(spec_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    rows = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))
    say("loading")
    model = load(spec["model"], spec["dtype"])
    say("measuring")
    before = mean_loss(model, rows["held_out"])
    say("quantising")
    quantise(model, rows["calibration"], spec["method"], spec["group_size"])
    say("writing")
    model.save_pretrained(spec["target"], save_compressed=True, max_shard_size=_SHARD_SIZE)
    del model
    gc.collect()
    say("checking")
    after = mean_loss(load(spec["target"], spec["dtype"]), rows["held_out"])
    found = {
        "loss_before": before,
        "loss_after": after,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": device_name(),
    }
    Path(spec["result"]).write_text(json.dumps(found), encoding="utf-8")


def say(phase: str) -> None:
    print(json.dumps({"phase": phase}), flush=True)


def load(folder: str, dtype: str) -> Any:
    """`dtype`: "bfloat16", "float16" or "float32", that of the weights on the disk."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def quantise(model: Any, rows: list[list[int]], method: str, group_size: int) -> None:
    """Change `model` in place: its linear layers but the head get 4-bit weights. On a card if there is one, a layer at a time."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        # Pinned memory only makes copies to a card faster, and asking for it without a driver raises.
        IntermediatesCache.pin_memory = lambda *_arguments, **_options: None
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    options = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    # "static" takes columns in the order of what passes through them, and leaves their groups as they lie: no index is stored.
    recipe = (
        [GPTQModifier(actorder="static", **options)]
        if method == "gptq"
        else [AWQModifier(), QuantizationModifier(**options)]
    )
    batches = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} for ids in rows
    ]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(rows))


def mean_loss(model: Any, rows: list[list[int]]) -> "float | None":
    """Mean over all predicted tokens of `rows`, in float32; None without rows."""
    import torch

    device = _place(model)
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in rows:
            given = torch.tensor([ids], device=device)
            logits = model(input_ids=given, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, given[0, 1:], reduction="sum"))
            count += len(ids) - 1
    if device != "cpu":
        model.to("cpu")
    return total / count if count else None


def _place(model: Any) -> str:
    """Bring the model to the card if it fits there whole; the name of where it is."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    if torch.cuda.mem_get_info()[0] < _ROOM * size:
        return "cpu"
    model.to("cuda")
    return "cuda"


if __name__ == "__main__":
    main(sys.argv[1])
