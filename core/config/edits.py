"""Edits that must travel together: another model, another data file, another method. Each is one operation on the source."""

import ast
import os
from pathlib import Path
from typing import Any, Final, TypeGuard

from core.config.facts import DataFacts, ModelFacts
from core.config.source import ConfigSource
from core.config.values import Code
from core.errors import InputError

DATASET: Final = "train_dataset"
CHAT_HOOK: Final = "custom_hooks[EvaluateChatHook]"
QUANTIZATION: Final = {
    "type": Code("BitsAndBytesConfig"),
    "load_in_4bit": True,
    "load_in_8bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_compute_dtype": Code("torch.bfloat16"),
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_type": "nf4",
}
LORA: Final = {
    "type": Code("LoraConfig"),
    "r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}
"""XTuner's own values."""
_ROWS_PER_PROCESS: Final = 1000


def method_of(source: ConfigSource) -> str:
    """`qlora`, `lora` or `full`."""
    if source.has("model.llm.quantization_config") and source.get("model.llm.quantization_config") is not None:
        return "qlora"
    return "lora" if source.has("model.lora") and source.get("model.lora") is not None else "full"


def set_method(source: ConfigSource, method: str) -> ConfigSource:
    """QLoRA ↔ LoRA ↔ full fine-tuning. The learning rate is left alone: the checks say when it is far off."""
    if method != "qlora" and source.has("model.llm.quantization_config"):
        source = source.delete("model.llm.quantization_config")
    if method == "qlora" and method_of(source) != "qlora":
        source = source.set("model.llm.quantization_config", QUANTIZATION)
    if method == "full" and source.has("model.lora"):
        return source.delete("model.lora")
    if method in {"lora", "qlora"} and (not source.has("model.lora") or source.get("model.lora") is None):
        source = source.set("model.lora", LORA)
    return source


def set_model(source: ConfigSource, folder: Path) -> ConfigSource:
    """The base model's folder, for model and tokenizer."""
    name = next((name for name in ("pretrained_model_name_or_path", "llm_name_or_path") if source.has(name)), None)
    return source.set(name or "model.llm.pretrained_model_name_or_path", str(folder))


def set_model_and_template(source: ConfigSource, model: ModelFacts) -> ConfigSource:
    """The base model, and the prompt template that fits it where the config has one."""
    source = set_model(source, model.path)
    return set_template(source, model.template) if model.template and source.has("prompt_template") else source


def set_template(source: ConfigSource, name: str) -> ConfigSource:
    """The prompt template for training and for the sample answers."""
    return source.set("prompt_template", Code(f"PROMPT_TEMPLATE.{name}"))


def dataset_path(source: ConfigSource) -> str:
    """Path of the one dataset that our data goes into. Raises InputError `config.foreign_dataset`, `config.no_such_place`."""
    kind = source.type_name(DATASET)
    if kind == "ConcatDataset":
        first = f"{DATASET}.datasets[0]"
        kind = source.type_name(first)
        path = first
    else:
        path = DATASET
    if kind != "process_hf_dataset":
        raise InputError("config.foreign_dataset", kind=kind or "?")
    return path


def data_files(source: ConfigSource) -> list[str]:
    """Local data files the config names; empty for a data set of the hub. Hub ids are in `dataset.path`."""
    for path in (DATASET, f"{DATASET}.datasets[0]"):
        if source.has(f"{path}.dataset.data_files"):
            return _texts(source.get(f"{path}.dataset.data_files"))
    return []


def set_data(source: ConfigSource, data: DataFacts, *, cpu_count: int | None = None) -> ConfigSource:
    """Train on a local file: address, reader, map function with its import, and number of tokenising processes, all at once."""
    return set_map_processes(set_map_fn(set_data_path(source, data.path), data), data, cpu_count=cpu_count)


def set_data_path(source: ConfigSource, file: Path) -> ConfigSource:
    """`data_files` and `path="json"`; of several data sets joined in the config only the first is kept, and it is ours."""
    path = dataset_path(source)
    if path != DATASET:
        source = source.set(f"{DATASET}.datasets", [Code(source.written(path, follow=False))])
    reader = f"{path}.dataset"
    if source.get(f"{reader}.path", None) == "json" and source.has(f"{reader}.data_files"):
        old = source.get(f"{reader}.data_files")
        if isinstance(old, dict) and source.has(f"{reader}.data_files.train"):
            return source.set(f"{reader}.data_files.train", str(file))
        return source.set(f"{reader}.data_files", [str(file)] if isinstance(old, list) else str(file))
    variable = source.variable_at(f"{reader}.path")
    if variable is not None:
        source = source.set(variable, str(file))
    train: Any = Code(variable) if variable is not None else str(file)
    value = {"type": Code("load_dataset"), "path": "json", "data_files": {"train": train}}
    return source.set(reader, value, follow=False) if variable is None else source.set(reader, value)


def set_map_fn(source: ConfigSource, data: DataFacts) -> ConfigSource:
    """The function that reads rows of this format. Raises InputError `config.needs_conversion` if XTuner has none."""
    if not data.is_native:
        raise InputError("config.needs_conversion", path=str(data.path), format=str(data.format))
    path = dataset_path(source)
    source = source.set(f"{path}.dataset_map_fn", None if data.map_fn is None else Code(data.map_fn))
    template = f"{path}.template_map_fn"
    if not data.format.is_chat:
        return source.set(template, None)
    if source.get(template, None) is None and source.has("prompt_template"):
        return source.set(template, {"type": Code("template_map_fn_factory"), "template": Code("prompt_template")})
    return source


def best_map_processes(data: DataFacts, cpu_count: int | None = None) -> int:
    """`min(cores, rows // 1000 + 1)`: each process drops its last partial pack, so that many of them lose data."""
    return max(1, min(cpu_count or os.cpu_count() or 1, data.rows // _ROWS_PER_PROCESS + 1))


def set_map_processes(source: ConfigSource, data: DataFacts, *, cpu_count: int | None = None) -> ConfigSource:
    return source.set(f"{dataset_path(source)}.map_num_proc", best_map_processes(data, cpu_count))


def rename(source: ConfigSource, *, name: str, new: str) -> ConfigSource:
    """A variable under another name, everywhere in the config."""
    places = [source.tree.span(node)[0] for node in ast.walk(source.tree.module) if _is_name(node, name)]
    data, size = source.tree.data, len(name.encode())
    for start in sorted(places, reverse=True):
        data = data[:start] + new.encode() + data[start + size :]
    return ConfigSource(data.decode("utf-8", errors="surrogatepass"))


def _is_name(node: ast.AST, name: str) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and node.id == name


def without_warmup(source: ConfigSource) -> ConfigSource:
    """Drop the linear warm-up and let the cosine start at 0: a warm-up of no iteration stops XTuner."""
    if source.has("param_scheduler[LinearLR]"):
        source = source.delete("param_scheduler[LinearLR]")
    if source.has("param_scheduler[CosineAnnealingLR].begin"):
        source = source.set("param_scheduler[CosineAnnealingLR].begin", 0, follow=False)
    return source


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) and not isinstance(value, Code) else []
