"""All 510 SFT configs of the installed XTuner through the form: nothing is lost, one place changes, training reads the new value."""

from typing import Any

import pytest

from core.config import fields
from core.config.fields import Filled, Kind
from core.config.library import read_config
from core.config.load import load_values
from core.config.source import ConfigSource
from core.xtuner.catalogue import ConfigEntry, configs

SUPERVISED = [entry for entry in configs() if entry.is_supervised]


def another(filled: Filled) -> Any:
    """A value that the field does not have now, within its limits."""
    field, value = filled.field, filled.value
    match field.kind:
        case Kind.INTEGER:
            low = int(field.minimum or 0)
            return low + 3 if value != low + 3 else low + 4
        case Kind.NUMBER:
            return 0.0125 if value != 0.0125 else 0.025
        case Kind.SWITCH:
            return not value
        case Kind.LINES:
            return ["你是谁？", 'a "quoted" line\\n']
        case Kind.CHOICE:
            return next(choice for choice in fields.choices(field) if choice != fields.shown(filled))
        case _:
            return "/models/新的 model"


def changed_span(old: str, new: str) -> tuple[str, str]:
    """What was taken out and what was put in, if the two texts are one edit apart."""
    front = _common(old, new)
    back = _common(old[front:][::-1], new[front:][::-1])
    return old[front : len(old) - back], new[front : len(new) - back]


def _common(left: str, right: str) -> int:
    """Length of the common beginning, by halving: texts of ten thousand characters, twelve thousand times."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def test_there_are_510() -> None:
    assert len(SUPERVISED) == 510


def test_no_edit_keeps_every_byte() -> None:
    for entry in SUPERVISED:
        data = entry.path.read_bytes()
        source = ConfigSource(read_config(entry.path))
        assert source.text.encode() == data, entry.name
        for filled in fields.fill(source):
            if filled.line is not None and filled.is_editable:
                assert source.set(filled.path, filled.value).text == source.text, (entry.name, filled.field.key)


def test_each_edit_changes_one_place() -> None:
    edits = 0
    for entry in SUPERVISED:
        text = read_config(entry.path)
        source = ConfigSource(text)
        for filled in fields.fill(source):
            if not filled.is_editable:
                continue
            wanted = another(filled)
            edited = fields.write(source, filled, wanted)
            place = (entry.name, filled.field.key)
            # Beside the value itself only an import may change: `torch` comes in with `torch.float32`, an optimizer with its name.
            before, after = text, edited.text
            if "import torch\n" not in text:
                after = after.replace("import torch\n", "", 1)
            if filled.field.key == "optim_type":
                before, after = (
                    one.replace(f"from torch.optim import {name}\n", "")
                    for one, name in ((text, "AdamW"), (after, wanted))
                )
            taken, put = changed_span(before, after)
            if filled.line is not None:
                assert taken in source.written(filled.path), place
                assert put in edited.written(filled.path), place
            else:
                assert taken == "", place
            assert fields.shown(Filled(filled.field, filled.path, edited.get(filled.path), 1)) == wanted, place
            edits += 1
    assert edits > 15_500


READ_AT = {
    "model_path": ["model.llm.pretrained_model_name_or_path", "tokenizer.pretrained_model_name_or_path"],
    "torch_dtype": ["model.llm.torch_dtype"],
    "attn_implementation": ["model.llm.attn_implementation"],
    "max_length": ["train_dataloader.dataset.max_length"],
    "pack_to_max_length": ["train_dataloader.dataset.pack_to_max_length"],
    "map_num_proc": ["train_dataloader.dataset.map_num_proc"],
    "dataloader_num_workers": ["train_dataloader.num_workers"],
    "max_epochs": ["train_cfg.max_epochs"],
    "lr": ["optim_wrapper.optimizer.lr"],
    "batch_size": ["train_dataloader.batch_size"],
    "accumulative_counts": ["optim_wrapper.accumulative_counts"],
    "optim_type": ["optim_wrapper.optimizer.type"],
    "beta1": ["optim_wrapper.optimizer.betas.0"],
    "beta2": ["optim_wrapper.optimizer.betas.1"],
    "weight_decay": ["optim_wrapper.optimizer.weight_decay"],
    "max_norm": ["optim_wrapper.clip_grad.max_norm"],
    "checkpointing": ["model.use_activation_checkpointing"],
    "double_quant": ["model.llm.quantization_config.bnb_4bit_use_double_quant"],
    "compute_dtype": ["model.llm.quantization_config.bnb_4bit_compute_dtype"],
    "amp_dtype": ["optim_wrapper.dtype"],
    "lora_targets": ["model.lora.target_modules"],
    "log_interval": ["default_hooks.logger.interval"],
    "lora_r": ["model.lora.r"],
    "lora_alpha": ["model.lora.lora_alpha"],
    "lora_dropout": ["model.lora.lora_dropout"],
    "save_steps": ["default_hooks.checkpoint.interval"],
    "save_total_limit": ["default_hooks.checkpoint.max_keep_ckpts"],
    "evaluation_freq": ["custom_hooks.EvaluateChatHook.every_n_iters"],
    "evaluation_inputs": ["custom_hooks.EvaluateChatHook.evaluation_inputs"],
    "max_new_tokens": ["custom_hooks.EvaluateChatHook.max_new_tokens"],
    "system": ["custom_hooks.EvaluateChatHook.system"],
}
"""Where XTuner's trainer looks, in the expanded config. Template and warm-up are looked at below."""


def at(values: dict[str, Any], path: str) -> Any:
    """The value at a path of an expanded config; a hook is found by the name of its type, a class is its name."""
    node: Any = values
    for step in path.split("."):
        if step.isdigit():
            node = node[int(step)]
        else:
            named = {item["type"].rpartition(".")[2]: item for item in node} if isinstance(node, list) else node
            node = named[step]
    return node.rpartition(".")[2] if path.endswith("optimizer.type") else node


SAMPLE = [entry for entry in SUPERVISED if entry.obstacle is None][::19]


@pytest.mark.parametrize("entry", SAMPLE, ids=lambda entry: entry.name)
def test_training_reads_the_new_values(entry: ConfigEntry) -> None:
    """Every field of a sample of the configs set at once, then read by mmengine in a process of its own."""
    source = ConfigSource(read_config(entry.path))
    wanted = {}
    for filled in fields.fill(source):
        if filled.is_editable:
            wanted[filled.field.key] = another(filled)
            source = fields.write(source, filled, wanted[filled.field.key])
    values = load_values(source.text)
    is_joined = "datasets" in values["train_dataloader"]["dataset"]
    for key, paths in READ_AT.items():
        for path in paths if key in wanted else []:
            if is_joined and path.startswith("train_dataloader.dataset."):
                continue
            assert at(values, path) == wanted[key], key
    if "warmup_ratio" in wanted:
        assert at(values, "param_scheduler.LinearLR.end") == pytest.approx(
            wanted["warmup_ratio"] * wanted["max_epochs"]
        )
    if "prompt_template" in wanted and "template_map_fn" in values["train_dataloader"]["dataset"]:
        template = at(values, "train_dataloader.dataset.template_map_fn.template")
        assert template == f"xtuner.utils.PROMPT_TEMPLATE.{wanted['prompt_template']}"
