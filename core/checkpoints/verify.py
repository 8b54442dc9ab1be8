"""Is the merged model what it should be? Tensor by tensor in bounded memory, and by the logits of both models where they fit.

Figures go to danlu.json and the model card. torch and transformers are imported only for the logits, in a job's own process.
"""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from core.checkpoints.card import write_card
from core.checkpoints.companions import DESCRIPTION
from core.checkpoints.layers import check_layers
from core.checkpoints.merge import MergePlan, plan_merge
from core.errors import InputError, JobError
from core.files import read_json, write_json
from core.messages import message
from core.runs.job import Progress

LOGIT_TOLERANCE: Final = 5e-3
"""Relative L2 error of the logits against peft's own merge, rounded to the same type, both models computed in float32. Equal weights give
about 1e-6; a few weights that fall on the other side of a rounding boundary, since the sums are in another order, a little more. What the
rounding itself costs depends on the model (SmolLM2-135M in bfloat16: 9e-2), so it is reported, not judged."""
_MANY_PARAMETERS: Final = 50_000_000
"""Below, torch's threads wait for each other longer than they compute."""
PROMPTS: Final = ("你好，请介绍一下你自己。", "Who are you, and who made you?", "What is 17 + 25?")


def verify_merge(folder: str, *, method: str = "auto", progress: Progress) -> dict[str, Any]:
    """Check the merged model `folder` against its base and adapters, as its danlu.json names them; write the figures there.

    `method`: "layers" (any size, memory < 100 MB), "logits" (both models in float32, one after the other;
    layers first), or "auto": logits if they fit in half of the free memory.
    Returns the figures. Raises JobError `checkpoints.verify_failed` if one is over its tolerance.
    """
    merged = Path(folder)
    described = read_json(merged / DESCRIPTION)
    if described.get("kind") != "merged":
        raise InputError("checkpoints.not_merged", path=folder)
    base = Path(described["base_model"]["path"])
    adapters = described["adapters"]
    plan = plan_merge(base, [Path(item["path"]) for item in adapters], [item["weight"] for item in adapters])
    figures = check_layers(plan, merged, progress)
    if method == "logits" or (method == "auto" and len(adapters) == 1 and _fits(plan)):
        figures |= check_logits(plan, base, Path(adapters[0]["path"]), merged, progress)
    figures["passed"] = bool(
        figures["differing_tensors"] == 0
        and figures["layer_error"] <= figures["layer_tolerance"]
        and figures.get("logit_error", 0.0) <= figures.get("logit_tolerance", 0.0)
    )
    described["verified"] = figures
    write_json(merged / DESCRIPTION, described)
    write_card(merged, described)
    if not figures["passed"]:
        error = max(figures["layer_error"], figures.get("logit_error", 0.0))
        raise JobError("checkpoints.verify_failed", path=folder, error=error, differing=figures["differing_tensors"])
    return figures


def check_logits(plan: MergePlan, base: Path, adapter: Path, merged: Path, progress: Progress) -> dict[str, Any]:
    """Logits and greedy answers of base + adapter (peft) and of the merged model, all computed in float32 on the CPU.

    The merged model is judged against peft's merge of the same adapter, rounded once to the same types; `rounding_error` tells how far
    that rounding moves the logits from base + adapter unmerged.
    """
    with _threads(plan):
        return _compare_logits(plan, base, adapter, merged, progress)


def _compare_logits(plan: MergePlan, base: Path, adapter: Path, merged: Path, progress: Progress) -> dict[str, Any]:
    from peft import PeftModel

    progress.update(0, 3, message("checkpoints.progress.verify_logits"))
    reference = PeftModel.from_pretrained(_load_model(base, is_untied=bool(plan.plan.untied)), str(adapter)).eval()
    unmerged, expected_answers = _run_model(reference, merged)
    rounded = _round_changed(reference.merge_and_unload(), plan)
    expected, _ = _run_model(rounded, merged, new_tokens=0)
    del reference, rounded
    gc.collect()
    progress.update(1, 3, message("checkpoints.progress.verify_logits"))
    found, answers = _run_model(_load_model(merged), merged)
    gc.collect()
    progress.update(2, 3, message("checkpoints.progress.verify_logits"))
    return {
        "method": "logits",
        "logit_error": _distance(expected, found),
        "logit_tolerance": LOGIT_TOLERANCE,
        "rounding_error": _distance(unmerged, found),
        "top1_agreement": float((unmerged.argmax(axis=1) == found.argmax(axis=1)).mean()),
        "answers": [
            {"prompt": prompt, "base_adapter": before, "merged": after}
            for prompt, before, after in zip(PROMPTS, expected_answers, answers, strict=True)
        ],
    }


@contextmanager
def _threads(plan: MergePlan) -> Iterator[None]:
    """All processors for a model that keeps them busy: a merge's own job gives torch one (`deliverables.ONE_THREAD`)."""
    import torch

    before = torch.get_num_threads()
    if _parameters(plan) >= _MANY_PARAMETERS:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parameters(plan: MergePlan) -> int:
    return sum(tensor.numel for shard, _ in plan.shards for tensor in shard.tensors.values())


def _distance(expected: Any, found: Any) -> float:
    """L2 distance of logits, relative to their spread around each position's mean."""
    spread = np.linalg.norm(expected - expected.mean(axis=1, keepdims=True))
    return float(np.linalg.norm(expected - found) / spread)


def _round_changed(model: Any, plan: MergePlan) -> Any:
    """Round the weights that the adapter changed to the type they have on the disk, in place."""
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16}
    dtypes = {name: tensor.dtype for shard, _ in plan.shards for name, tensor in shard.tensors.items()}
    dtypes |= {name: shard.tensors[old].dtype for shard, new in plan.shards for name, old in new.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in plan.plan.changes and dtypes.get(name) in types:
                parameter.copy_(parameter.to(types[dtypes[name]]).float())
    return model


def _fits(plan: MergePlan) -> bool:
    """Whether one model in float32 and as much again for loading take less than half of the free memory."""
    return _parameters(plan) * 4 * 2 < psutil.virtual_memory().available / 2


def _load_model(folder: Path, *, is_untied: bool = False) -> Any:
    """`is_untied`: give a tied head its own copy, since only one of the two was trained and peft would merge into both."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_json(folder / "config.json")
    options: Mapping[str, Any] = {"trust_remote_code": True} if "auto_map" in config else {}
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=True, **options
    ).eval()
    if is_untied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


def _run_model(model: Any, tokenizer_folder: Path, new_tokens: int = 12) -> tuple[Any, list[str]]:
    """Logits of every position of the prompts, one under the other, and a greedy answer of at most `new_tokens` to each."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), trust_remote_code=True)
    logits, answers = [], []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = _encode(tokenizer, prompt)
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float().numpy())
            answers.append(_continue(model, tokenizer, ids, new_tokens))
    return np.concatenate(logits), answers


def _encode(tokenizer: Any, prompt: str) -> Any:
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    return tokenizer(prompt, return_tensors="pt").input_ids


def _continue(model: Any, tokenizer: Any, ids: Any, new_tokens: int) -> str:
    """Greedy tokens without a cache: works for every architecture, remote code too."""
    import torch

    start = ids.shape[1]
    for _ in range(new_tokens):
        best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if int(best) in {tokenizer.eos_token_id}:
            break
        ids = torch.cat([ids, best], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
