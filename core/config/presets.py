"""A config of our own for a model folder XTuner ships none for, written in XTuner's five parts so that a person can read it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.config.edits import QUANTIZATION, best_map_processes
from core.config.facts import DataFacts, Machine, ModelFacts, read_data
from core.config.recipes import QUESTIONS
from core.config.source import ConfigSource
from core.config.validation import DATASET_BLOCK, SETTINGS, set_validation, sibling
from core.config.values import Code, format_value, quote
from core.errors import InputError

_PATTERN: Final = Path(__file__).parent / "preset.py.txt"
_TARGETS: Final = {
    **dict.fromkeys(("internlm2",), ("wqkv", "wo", "w1", "w2", "w3")),
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "internlm3", "olmo2", "smollm3"),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
}
"""Linear layers of the decoder. Where a family is not listed XTuner looks for all of them, the output head included for some."""
_LEARNING_RATES: Final = {"qlora": 2e-4, "lora": 2e-4, "full": 2e-5}
_TOKENS_PER_BYTE: Final = 0.2
"""A low guess, so that a warm-up is only planned where it lasts at least one step."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a person chooses before the config is written; the form changes it later."""

    method: str = "lora"
    max_length: int = 1024
    max_epochs: int = 3
    accumulative_counts: int = 4


def make(model: ModelFacts, data: DataFacts | None, machine: Machine, wishes: Wishes) -> str:
    """Source of a config that XTuner 0.2.0 runs.

    Raises InputError `config.no_causal_template` if no prompt template is known for the model, `config.needs_conversion` if the
    data is in no format that XTuner reads, `config.quantized_base` for a model whose weights are quantised already.
    """
    if model.template is None:
        raise InputError("config.no_causal_template", path=str(model.path), model_type=model.model_type or "?")
    if model.is_quantized:
        raise InputError("config.quantized_base", path=str(model.path))
    if data is not None and not data.is_native:
        raise InputError("config.needs_conversion", path=str(data.path), format=str(data.format))
    text = _PATTERN.read_text(encoding="utf-8")
    for name, value in _values(model, data, machine, wishes).items():
        # A placeholder alone on its line takes the line with it where it has nothing to say.
        text = text.replace(f"<<{name}>>", value or "<<>>")
    text = _drop_empty_lines(text)
    held_out = sibling(data.path) if data is not None else None
    return text if held_out is None else set_validation(ConfigSource(text), read_data(held_out)).text


def file_name(model: ModelFacts, data: DataFacts | None, method: str) -> str:
    """`smollm2_135m_instruct_lora_personal_assistant`: as XTuner names its configs."""
    parts = (model.path.name, method, data.path.stem if data else "data")
    return re.sub(r"[^0-9a-z\u4e00-\u9fff]+", "_", "_".join(parts).lower()).strip("_")


def _values(model: ModelFacts, data: DataFacts | None, machine: Machine, wishes: Wishes) -> dict[str, str]:
    has_gpu = machine.gpu_count > 0
    # Half precision wants hardware for it: bfloat16 needs no loss scaling; a CPU trains in full precision.
    dtype = "float32" if not has_gpu else "float16" if machine.supports_bf16 is False else "bfloat16"
    map_fn = data.map_fn if data is not None else "openai_map_fn"
    is_chat = data is None or data.format.is_chat
    names = sorted({name for name in (map_fn, "template_map_fn_factory" if is_chat else None) if name})
    method, loaders = wishes.method, ["AutoModelForCausalLM", "AutoTokenizer"]
    return {
        "transformers": ", ".join([*loaders, "BitsAndBytesConfig"] if method == "qlora" else loaders),
        "peft": "" if method == "full" else "from peft import LoraConfig",
        "map_fns": f"from xtuner.dataset.map_fns import {', '.join(names)}" if names else "",
        "wrapper": "AmpOptimWrapper" if has_gpu else "OptimWrapper",
        "schedulers": "CosineAnnealingLR, LinearLR" if _has_warmup(data, wishes) else "CosineAnnealingLR",
        "model_path": quote(str(model.path), '"'),
        "data_path": quote(str(data.path) if data else "data/train.json", '"'),
        "template": str(model.template),
        "max_length": str(wishes.max_length),
        "accumulative_counts": str(wishes.accumulative_counts),
        "max_epochs": str(wishes.max_epochs),
        "lr": format_value(_LEARNING_RATES[method], "1e-4"),
        "warmup": "warmup_ratio = 0.03" if _has_warmup(data, wishes) else "",
        "save_steps": str(wishes.accumulative_counts * -(-500 // wishes.accumulative_counts)),
        "questions": format_value(list(QUESTIONS)),
        "attention": 'attn_implementation="sdpa",',
        # Trained weights stay in full precision: AMP's gradient scaler takes no others, and DeepSpeed casts them itself.
        "torch_dtype": f"torch.{'float32' if method == 'full' else dtype}",
        "quantization": _quantization(dtype) if method == "qlora" else "",
        "lora": "" if method == "full" else _lora(model),
        "map_fn": map_fn or "None",
        "template_map_fn": _TEMPLATE_MAP_FN if is_chat else "None",
        "map_num_proc": str(best_map_processes(data, machine.cpu_count) if data else 1),
        "amp": {
            "float32": "",
            "float16": 'dtype="float16",\n    loss_scale="dynamic",',
            "bfloat16": 'dtype="bfloat16",',
        }[dtype],
        **_validation(
            map_fn, is_chat=is_chat, every=wishes.accumulative_counts * -(-100 // wishes.accumulative_counts)
        ),
        "begin": "warmup_ratio * max_epochs" if _has_warmup(data, wishes) else "0",
        "linear": _WARMUP if _has_warmup(data, wishes) else "",
        "backend": "nccl" if has_gpu else "gloo",
    }


_WARMUP: Final = """dict(
        type=LinearLR,
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=warmup_ratio * max_epochs,
        convert_to_iter_based=True,
    ),"""


_TEMPLATE_MAP_FN: Final = "dict(type=template_map_fn_factory, template=prompt_template)"


def _validation(map_fn: str | None, *, is_chat: bool, every: int) -> dict[str, str]:
    """The block and its settings, on no data yet: the form or a person names it."""
    block = DATASET_BLOCK.format(
        tokenizer="tokenizer",
        max_length="max_length",
        map_fn=map_fn or "None",
        template_map_fn=_TEMPLATE_MAP_FN if is_chat else "None",
        map_num_proc=1,
    )
    return {
        "validation_settings": SETTINGS.format(files="[]", every=every).rstrip(),
        "validation_block": block.rstrip(),
    }


def _has_warmup(data: DataFacts | None, wishes: Wishes) -> bool:
    """Whether 3 % of the training is at least one iteration even if the texts are short; if not, XTuner would stop."""
    if data is None:
        return False
    packs = data.size_bytes * _TOKENS_PER_BYTE / wishes.max_length
    return int(0.03 * wishes.max_epochs * packs) >= 1


def _lora(model: ModelFacts) -> str:
    targets = _TARGETS.get(model.model_type)
    named = f"\n        target_modules={format_value(list(targets))}," if targets else ""
    return (
        "lora=dict(\n        type=LoraConfig,\n        r=64,\n        lora_alpha=128,\n        lora_dropout=0.05,"
        f'{named}\n        bias="none",\n        task_type="CAUSAL_LM",\n    ),'
    )


def _quantization(dtype: str) -> str:
    value = {**QUANTIZATION, "bnb_4bit_compute_dtype": Code(f"torch.{dtype}")}
    return f"quantization_config={format_value(value)},".replace("\n", "\n        ")


def _drop_empty_lines(text: str) -> str:
    """Lines that only held an empty placeholder go; blank lines of the layout stay."""
    return re.sub(r"^[ \t]*<<>>\n", "", text, flags=re.MULTILINE)
