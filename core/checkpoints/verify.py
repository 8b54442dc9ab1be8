"""Is the merged model what it should be? Tensor by tensor in bounded memory, and by the logits of both models where they fit.

Figures go to danlu.json and the model card. torch and transformers are imported only for the logits, in a job's own process.
"""

import gc
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from core.checkpoints.card import write_card
from core.checkpoints.companions import DESCRIPTION
from core.checkpoints.lora import Change, load_pair
from core.checkpoints.merge import MergePlan, plan_merge
from core.checkpoints.shards import read_folder
from core.checkpoints.tensors import DiskTensor, widen
from core.errors import InputError, JobError
from core.files import read_json, write_json
from core.messages import message
from core.runs.job import Progress

LAYER_TOLERANCE: Final = {"F32": 1e-5, "F16": 2e-3, "BF16": 1.6e-2}
"""Relative L2 error of one product W'·x that rounding W' to the type may cause (a few times its unit roundoff)."""
LOGIT_TOLERANCE: Final = 5e-3
"""Relative L2 error of the logits against peft's own merge, rounded to the same type, both models computed in float32. Equal weights give
about 1e-6; a few weights that fall on the other side of a rounding boundary, since the sums are in another order, a little more. What the
rounding itself costs depends on the model (SmolLM2-135M in bfloat16: 9e-2), so it is reported, not judged."""
PROMPTS: Final = ("你好，请介绍一下你自己。", "Who are you, and who made you?", "What is 17 + 25?")
_BLOCK: Final = 1 << 20


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
    figures["sha256"] = hash_files(merged, progress)
    described["verified"] = figures
    write_json(merged / DESCRIPTION, described)
    write_card(merged, described)
    if not figures["passed"]:
        error = max(figures["layer_error"], figures.get("logit_error", 0.0))
        raise JobError("checkpoints.verify_failed", path=folder, error=error, differing=figures["differing_tensors"])
    return figures


def check_layers(plan: MergePlan, merged: Path, progress: Progress) -> dict[str, Any]:
    """Unchanged tensors must equal the base's bytes; for a changed one W'·x must equal W·x + s·B·(A·x) on a random x.

    The right side never forms B·A: it is another way to the same numbers than the merge's.
    """
    result = {name: tensor for shard in read_folder(merged) for name, tensor in shard.tensors.items()}
    sources = {
        name: tensor
        for shard, new in plan.shards
        for name, tensor in [*shard.tensors.items(), *((n, shard.tensors[o]) for n, o in new.items())]
    }
    differing = sorted(result.keys() ^ sources.keys())
    worst, done = 0.0, 0
    tolerance = LAYER_TOLERANCE[plan.dtype] if plan.dtype in LAYER_TOLERANCE else LAYER_TOLERANCE["F32"]
    for name, source in sources.items():
        if name in result:
            change = plan.plan.changes.get(name)
            if result[name].shape != source.shape or result[name].dtype != source.dtype:
                differing.append(name)
            elif change is None:
                differing += [] if _is_same(source, result[name]) else [name]
            else:
                worst = max(worst, _layer_error(source, change, result[name]))
        done += source.nbytes
        progress.update(done, plan.size_bytes, message("checkpoints.progress.verify_layers"), unit="bytes")
    changed = len(plan.plan.changes)
    return {
        "method": "layers",
        "tensors": len(sources),
        "changed_tensors": changed,
        "differing_tensors": len(differing),
        "layer_error": worst,
        "layer_tolerance": tolerance,
    }


def check_logits(plan: MergePlan, base: Path, adapter: Path, merged: Path, progress: Progress) -> dict[str, Any]:
    """Logits and greedy answers of base + adapter (peft) and of the merged model, all computed in float32 on the CPU.

    The merged model is judged against peft's merge of the same adapter, rounded once to the same types; `rounding_error` tells how far
    that rounding moves the logits from base + adapter unmerged.
    """
    from peft import PeftModel

    progress.update(0, 3, message("checkpoints.progress.verify_logits"))
    reference = PeftModel.from_pretrained(_load_model(base), str(adapter)).eval()
    unmerged, expected_answers = _run_model(reference, merged)
    rounded = _round_changed(reference.merge_and_unload(), plan)
    expected, _ = _run_model(rounded, merged)
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


def hash_files(folder: Path, progress: Progress) -> dict[str, str]:
    """sha256 of each weight file, as it lies on the disk."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                progress.check()
        found[file.name] = digest.hexdigest()
    return found


def _fits(plan: MergePlan) -> bool:
    """Whether one model in float32 and as much again for loading take less than half of the free memory."""
    parameters = sum(_numel(tensor) for shard, _ in plan.shards for tensor in shard.tensors.values())
    return parameters * 4 * 2 < psutil.virtual_memory().available / 2


def _numel(tensor: DiskTensor) -> int:
    return tensor.numel


def _is_same(left: DiskTensor, right: DiskTensor) -> bool:
    return all(
        np.array_equal(
            left.read_flat(start, min(start + _BLOCK, left.numel)),
            right.read_flat(start, min(start + _BLOCK, left.numel)),
        )
        for start in range(0, left.numel, _BLOCK)
    )


def _layer_error(source: DiskTensor, change: Change, result: DiskTensor) -> float:
    """Relative L2 error of W'·x. DoRA rescales rows (columns if transposed), which is done to the product where rows are outputs."""
    if len(source.shape) != 2 or any(pair.magnitude is not None for pair in change.pairs):
        return _whole_error(source, change, result)
    start = change.replacement or source
    rows, width = source.shape
    probe = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    loaded = [load_pair(pair) for pair in change.pairs]
    inner = [pair.right @ probe for pair in loaded]
    error = scale = 0.0
    step = max(1, _BLOCK // width)
    for row in range(0, rows, step):
        end = min(rows, row + step)
        expected = widen(start.read_flat(row * width, end * width), start.dtype).reshape(-1, width) @ probe
        for pair, vector in zip(loaded, inner, strict=True):
            expected += pair.left[row:end] @ vector
        found = widen(result.read_flat(row * width, end * width), result.dtype).reshape(-1, width) @ probe
        error += float(np.square(expected - found).sum())
        scale += float(np.square(expected).sum())
    return float(np.sqrt(error / scale)) if scale else float(np.sqrt(error))


def _whole_error(source: DiskTensor, change: Change, result: DiskTensor) -> float:
    """For vectors and DoRA: the whole tensor in float64."""
    start = change.replacement or source
    expected = widen(start.read(), start.dtype).astype(np.float64)
    for pair in change.pairs:
        loaded = load_pair(pair)
        expected = expected + loaded.left.astype(np.float64) @ loaded.right.astype(np.float64)
    for pair in change.pairs:
        if pair.magnitude is not None:
            magnitude = widen(pair.magnitude.read(), pair.magnitude.dtype).astype(np.float64)
            axis = 0 if pair.is_transposed else 1
            factor = magnitude / np.linalg.norm(expected, axis=axis)
            expected = expected * (factor if pair.is_transposed else factor[:, None])
    for tensor, factor in change.additions:
        expected = expected + widen(tensor.read(), tensor.dtype).astype(np.float64) * factor
    found = widen(result.read(), result.dtype)
    return float(np.linalg.norm(expected - found) / (np.linalg.norm(expected) or 1.0))


def _load_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    config = read_json(folder / "config.json")
    options: Mapping[str, Any] = {"trust_remote_code": True} if "auto_map" in config else {}
    return AutoModelForCausalLM.from_pretrained(
        str(folder), torch_dtype=torch.float32, low_cpu_mem_usage=True, **options
    ).eval()


def _run_model(model: Any, tokenizer_folder: Path) -> tuple[Any, list[str]]:
    """Logits of every position of the prompts, one under the other, and a short greedy answer to each."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), trust_remote_code=True)
    logits, answers = [], []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = _encode(tokenizer, prompt)
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float().numpy())
            answers.append(_continue(model, tokenizer, ids))
    return np.concatenate(logits), answers


def _encode(tokenizer: Any, prompt: str) -> Any:
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    return tokenizer(prompt, return_tensors="pt").input_ids


def _continue(model: Any, tokenizer: Any, ids: Any, new_tokens: int = 12) -> str:
    """Greedy tokens without a cache: works for every architecture, remote code too."""
    import torch

    start = ids.shape[1]
    for _ in range(new_tokens):
        best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if int(best) in {tokenizer.eos_token_id}:
            break
        ids = torch.cat([ids, best], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
