"""The model card (README.md) of a deliverable: what it is, what it came from, how it was checked, how to load it.

In English, as hubs expect.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from core.checkpoints.serving import SERVED_KINDS, serve_commands
from core.files import write_text

_KINDS: Final = {
    "adapter": "LoRA adapter (PEFT)",
    "merged": "Base model with the adapter merged in",
    "full": "Fully fine-tuned model",
    "gguf": "GGUF file for llama.cpp and Ollama",
    "fp8": "Model with its linear layers in FP8, for vLLM",
    "awq": "Model with 4-bit weights (AWQ), for vLLM",
    "gptq": "Model with 4-bit weights (GPTQ), for vLLM",
}
_LOAD: Final = {
    "adapter": (
        "from peft import AutoPeftModelForCausalLM",
        'model = AutoPeftModelForCausalLM.from_pretrained("{name}", torch_dtype="auto")',
    ),
    "merged": (
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("{name}", torch_dtype="auto")',
    ),
}


def write_card(folder: Path, value: Mapping[str, Any]) -> None:
    """Write README.md of `folder` from what its danlu.json holds."""
    name = folder.name.removeprefix(".").removesuffix(".part")
    parts = [
        _front_matter(value),
        f"# {name}",
        _facts(value),
        _verification(value.get("verified")),
        _quantization(value.get("quantized")),
        _template(value.get("prompt_template"), value.get("system")),
        _loading(name, value),
        _hashes(value.get("verified")),
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _front_matter(value: Mapping[str, Any]) -> str:
    """What hubs read: the library, and the base if it is on a hub."""
    lines = ["library_name: " + {"adapter": "peft", "gguf": "gguf"}.get(str(value["kind"]), "transformers")]
    base = str((value.get("base_model") or {}).get("path") or "")
    if base.count("/") == 1 and not base.startswith(("/", ".")):  # a name on a hub, not a folder
        lines.append(f"base_model: {base}")
    lines += ["pipeline_tag: text-generation", "tags:", "- danlu", "- xtuner"]
    return "\n".join(["---", *lines, "---"])


def _facts(value: Mapping[str, Any]) -> str:
    base = Path(str((value.get("base_model") or {}).get("path") or "unknown")).name
    rows = {
        "Kind": _KINDS.get(str(value["kind"]), str(value["kind"])),
        "Base model": base,
        "Training run": value.get("run"),
        "Checkpoint": value.get("checkpoint"),
        "Data type": value["dtype"],
        "Adapters": ", ".join(
            f"{Path(item['path']).name} × {item['weight']:g}" for item in value.get("adapters") or []
        ),
        "Made at": value.get("created_at"),
    }
    return _table(("", ""), [(key, str(item)) for key, item in rows.items() if item])


def _verification(figures: Mapping[str, Any] | None) -> str:
    """The check in numbers, and its verdict."""
    if not figures:
        return ""
    rows = [
        ("Tensors checked", f"{figures['tensors']}, {figures['changed_tensors']} of them changed by the training", ""),
        ("Tensors that differ where they must not", str(figures["differing_tensors"]), "0"),
        ("Relative error of one layer", f"{figures['layer_error']:.2g}", f"≤ {figures['layer_tolerance']:.2g}"),
    ]
    if "logit_error" in figures:
        rows.append(
            ("Relative error of the logits", f"{figures['logit_error']:.2g}", f"≤ {figures['logit_tolerance']:.2g}")
        )
        rows.append(("Logits moved by rounding the weights", f"{figures['rounding_error']:.2g}", ""))
        rows.append(("Same next token", f"{figures['top1_agreement']:.1%}", ""))
    verdict = "✅ Passed" if figures.get("passed") else "❌ Failed"
    parts = [
        "## Verification",
        f"{verdict}. Every tensor was compared with base model and adapter.",
        _table(("Check", "Found", "Allowed"), rows),
    ]
    if answers := figures.get("answers"):
        pairs = [(_cell(item["prompt"]), _cell(item["base_adapter"]), _cell(item["merged"])) for item in answers]
        parts.append(_table(("Prompt", "Base + adapter", "Merged"), pairs))
    return "\n\n".join(parts)


def _quantization(figures: Mapping[str, Any] | None) -> str:
    """How the weights became 4-bit, and what that cost."""
    if not figures:
        return ""
    rows = [
        (
            "Method",
            f"{str(figures['method']).upper()}, {figures['bits']} bits, symmetric, groups of {figures['group_size']}",
        ),
        (
            "Calibrated on",
            f"{figures['rows']} rows, {figures['tokens']} tokens, with the prompt template of the training",
        ),
        ("Matrices", f"{figures['matrices']} quantised; {figures['kept']} tensors not quantised"),
        ("Relative error of the weights", f"{figures['weight_error']:.3f}; worst {figures['worst_error']:.3f}"),
    ]
    if figures.get("loss_before") is not None:
        loss = f"{figures['loss_before']:.4f} before, {figures['loss_after']:.4f} after"
        rows.append((f"Loss on {figures['held_out_rows']} rows kept back", loss))
    rows.append(("Made with", ", ".join(f"{name} {version}" for name, version in figures["versions"].items())))
    return "## Quantisation\n\n" + _table(("", ""), [(key, _cell(text)) for key, text in rows])


def _template(template: Mapping[str, Any] | None, system: str | None) -> str:
    if not template:
        return ""
    text = json.dumps(template, ensure_ascii=False, indent=2)
    shown = f"\n\nSystem text: {_cell(system)}" if system else ""
    return f"## Prompt template\n\nThe tokenizer's chat template is the one of the training:\n\n```json\n{text}\n```{shown}"


def _loading(name: str, value: Mapping[str, Any]) -> str:
    if value["kind"] == "gguf":
        return f"## Use\n\n```sh\nollama create {name} -f Modelfile && ollama run {name}\nllama-cli -m {value['file']} --jinja\n```"
    if value["kind"] in SERVED_KINDS:
        commands = "\n".join(serve_commands(name, group_size=(value.get("quantized") or {}).get("group_size")))
        return f"## Use\n\n```sh\n{commands}\n```\n\ntransformers reads it too, with the package compressed-tensors."
    lines = _LOAD.get(str(value["kind"]), _LOAD["merged"])
    tokenizer = ["from transformers import AutoTokenizer", 'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    code = "\n".join(line.format(name=name) for line in (lines[0], tokenizer[0], "", lines[1], tokenizer[1]))
    return f"## Use\n\n```python\n{code}\n```"


def _hashes(figures: Mapping[str, Any] | None) -> str:
    hashes = (figures or {}).get("sha256") or {}
    return (
        "## SHA-256\n\n" + _table(("File", "SHA-256"), [(name, f"`{value}`") for name, value in hashes.items()])
        if hashes
        else ""
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _cell(text: str) -> str:
    """Text inside a table: one line, no bars."""
    return " ".join(str(text).split()).replace("|", "\\|")
