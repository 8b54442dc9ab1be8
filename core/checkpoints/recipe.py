"""What a checkpoint was trained with: LoRA values, base model, prompt template, system text.

Read from the run's run.json where Danlu made the run, else from the config text that mmengine keeps in the checkpoint. The config
is parsed, never executed: a value that would have to be computed is not known.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError
from core.runs.directory import RunDirectory

LORA_FIELDS: Final = (
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "modules_to_save", "target_modules", "layers_to_transform", "layers_pattern", "lora_bias", "init_lora_weights",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that is known; None or empty where nothing is."""

    lora: dict[str, Any] | None = None
    """LoraConfig's values by name; None: no LoRA in the config."""
    base_model: str | None = None
    """Path (or hub name) of the base model."""
    base_fingerprint: str | None = None
    prompt_template: dict[str, Any] | None = None
    """XTuner's fields, as `core.xtuner.templates.PromptTemplate.to_json` gives them."""
    system: str | None = None
    trust_remote_code: bool = False
    run: str | None = None
    """Name of the run, if the checkpoint lies in one."""
    values: dict[str, Any] = field(default_factory=dict)


def read_recipe(checkpoint: Path, meta: Mapping[str, Any]) -> Recipe:
    """The recipe of `checkpoint`, from its run's folder and its own `meta`."""
    text = meta.get("cfg")
    values = parse_config(text) if isinstance(text, str) else {}
    if "model" not in values:
        values = next(
            (parse_config(file.read_text("utf-8", "replace")) for file in _sources(checkpoint.parent)), values
        )
    model = _dict(values.get("model"))
    llm = _dict(model.get("llm"))
    lora = model.get("lora") if isinstance(model.get("lora"), dict) else None
    details = _run_details(checkpoint.parent)
    base = details.get("base_model") or {}
    template = details.get("prompt_template") or _template(values.get("prompt_template"))
    base_path = (
        base.get("path") or llm.get("pretrained_model_name_or_path") or values.get("pretrained_model_name_or_path")
    )
    return Recipe(
        lora={key: lora[key] for key in LORA_FIELDS if key in lora} if lora is not None else None,
        base_model=base_path if isinstance(base_path, str) else None,
        base_fingerprint=base.get("fingerprint"),
        prompt_template=template,
        system=_text(details.get("system", values.get("SYSTEM"))),
        trust_remote_code=llm.get("trust_remote_code") is True,
        run=checkpoint.parent.name,
        values=values,
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def parse_config(text: str) -> dict[str, Any]:
    """Top-level values of an mmengine config. What is no literal, `dict(…)` or name of such a value comes back as its source text."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return {}
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _value(node.value, values)
    return values


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {word.arg: _value(word.value, known) for word in node.keywords if word.arg}
    if isinstance(node, ast.Dict):
        return {
            _value(key, known): _value(value, known) for key, value in zip(node.keys, node.values, strict=True) if key
        }
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, known) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _sources(run: Path) -> list[Path]:
    """Configs of a run: Danlu's own copy first, then the one that XTuner dumps."""
    return sorted((run / "source").glob("*.py")) + sorted(
        path for path in run.glob("*.py") if path.name != "zero_to_fp32.py"
    )


def _run_details(run: Path) -> dict[str, Any]:
    try:
        return RunDirectory(run).spec().details
    except DanluError:
        return {}


def _template(value: Any) -> dict[str, Any] | None:
    """A template written out, or the name of one of XTuner's."""
    if isinstance(value, dict) and "INSTRUCTION" in value:
        return value
    if isinstance(value, str) and "PROMPT_TEMPLATE." in value:
        from core.xtuner.templates import prompt_templates

        try:
            found = prompt_templates().get(value.rpartition(".")[2])
        except DanluError:
            return None
        return found.to_json() if found else None
    return None


def _text(value: Any) -> str | None:
    """A system text; the name of one of XTuner's is looked up."""
    if not isinstance(value, str) or not value:
        return None
    if "SYSTEM_TEMPLATE." in value:
        from core.xtuner.templates import system_templates

        try:
            return system_templates().get(value.rpartition(".")[2])
        except DanluError:
            return None
    return value
