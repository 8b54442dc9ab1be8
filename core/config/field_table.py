"""The fields of the form: where each stands in a config, its type, its range and what is usual. Knows no values."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final


class Kind(StrEnum):
    """How a value is asked for."""

    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"
    CHOICE = "choice"
    SWITCH = "switch"
    LINES = "lines"
    """A list of texts, one a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the form. Words: `config.fields.<key>.label` and `.help`."""

    key: str
    paths: tuple[str, ...]
    """Where it may stand; the first that exists counts. With `may_add`, the first is where it is put."""
    kind: Kind
    group: str
    minimum: float | None = None
    maximum: float | None = None
    usual: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    may_add: bool = False
    default: Any = None
    """What XTuner takes where the config does not say."""


_DATASET: Final = "train_dataset"
_QUANTIZATION: Final = "model.llm.quantization_config"
_CHAT_HOOK: Final = "custom_hooks[EvaluateChatHook]"
DTYPES: Final = ("torch.bfloat16", "torch.float16", "torch.float32", "auto")
FIELDS: Final = (
    Field(key="model_path", paths=("pretrained_model_name_or_path", "llm_name_or_path"), kind=Kind.TEXT, group="model"),
    Field(key="prompt_template", paths=("prompt_template",), kind=Kind.CHOICE, group="model"),
    Field(
        key="torch_dtype",
        paths=("model.llm.torch_dtype",),
        kind=Kind.CHOICE,
        group="model",
        choices=DTYPES,
        may_add=True,
        default="auto",
    ),
    Field(
        key="attn_implementation",
        paths=("model.llm.attn_implementation",),
        kind=Kind.CHOICE,
        group="model",
        choices=("sdpa", "eager", "flash_attention_2"),
        may_add=True,
    ),
    Field(
        key="checkpointing",
        paths=("model.use_activation_checkpointing",),
        kind=Kind.SWITCH,
        group="model",
        may_add=True,
        default=True,
    ),
    Field(key="double_quant", paths=(f"{_QUANTIZATION}.bnb_4bit_use_double_quant",), kind=Kind.SWITCH, group="model"),
    Field(
        key="compute_dtype",
        paths=(f"{_QUANTIZATION}.bnb_4bit_compute_dtype",),
        kind=Kind.CHOICE,
        group="model",
        choices=DTYPES[:3],
    ),
    Field(
        key="max_length",
        paths=("max_length",),
        kind=Kind.INTEGER,
        group="data",
        minimum=16,
        maximum=1_048_576,
        usual=(512, 4096),
    ),
    Field(key="pack_to_max_length", paths=("pack_to_max_length",), kind=Kind.SWITCH, group="data"),
    Field(
        key="map_num_proc",
        paths=(f"{_DATASET}.map_num_proc",),
        kind=Kind.INTEGER,
        group="data",
        minimum=1,
        maximum=256,
        usual=(1, 8),
        may_add=True,
        default=32,
    ),
    Field(
        key="dataloader_num_workers",
        paths=("dataloader_num_workers",),
        kind=Kind.INTEGER,
        group="data",
        minimum=0,
        maximum=64,
        usual=(0, 4),
    ),
    Field(
        key="max_epochs",
        paths=("max_epochs",),
        kind=Kind.INTEGER,
        group="training",
        minimum=1,
        maximum=10_000,
        usual=(1, 5),
    ),
    Field(key="lr", paths=("lr",), kind=Kind.NUMBER, group="training", minimum=0.0, maximum=1.0, usual=(1e-5, 4e-4)),
    Field(
        key="batch_size",
        paths=("batch_size",),
        kind=Kind.INTEGER,
        group="training",
        minimum=1,
        maximum=4096,
        usual=(1, 8),
    ),
    Field(
        key="accumulative_counts",
        paths=("accumulative_counts",),
        kind=Kind.INTEGER,
        group="training",
        minimum=1,
        maximum=4096,
        usual=(1, 32),
    ),
    Field(
        key="warmup_ratio",
        paths=("warmup_ratio",),
        kind=Kind.NUMBER,
        group="training",
        minimum=0.0,
        maximum=0.9,
        usual=(0.0, 0.1),
    ),
    Field(
        key="weight_decay",
        paths=("weight_decay",),
        kind=Kind.NUMBER,
        group="training",
        minimum=0.0,
        maximum=1.0,
        usual=(0.0, 0.1),
    ),
    Field(
        key="max_norm",
        paths=("max_norm",),
        kind=Kind.NUMBER,
        group="training",
        minimum=0.0,
        maximum=1000.0,
        usual=(0.3, 1.0),
    ),
    Field(
        key="amp_dtype",
        paths=("optim_wrapper.dtype",),
        kind=Kind.CHOICE,
        group="training",
        choices=("bfloat16", "float16"),
    ),
    Field(
        key="lora_r", paths=("model.lora.r",), kind=Kind.INTEGER, group="lora", minimum=1, maximum=1024, usual=(8, 128)
    ),
    Field(
        key="lora_alpha",
        paths=("model.lora.lora_alpha",),
        kind=Kind.INTEGER,
        group="lora",
        minimum=1,
        maximum=4096,
        usual=(16, 256),
    ),
    Field(
        key="lora_dropout",
        paths=("model.lora.lora_dropout",),
        kind=Kind.NUMBER,
        group="lora",
        minimum=0.0,
        maximum=0.9,
        usual=(0.0, 0.1),
    ),
    Field(key="lora_targets", paths=("model.lora.target_modules",), kind=Kind.LINES, group="lora", may_add=True),
    Field(
        key="save_steps",
        paths=("save_steps",),
        kind=Kind.INTEGER,
        group="saving",
        minimum=1,
        maximum=10_000_000,
        usual=(100, 2000),
    ),
    Field(
        key="save_total_limit",
        paths=("save_total_limit",),
        kind=Kind.INTEGER,
        group="saving",
        minimum=-1,
        maximum=1000,
        usual=(1, 5),
    ),
    Field(
        key="log_interval",
        paths=("default_hooks.logger.interval",),
        kind=Kind.INTEGER,
        group="saving",
        minimum=1,
        maximum=10_000,
        usual=(1, 10),
    ),
    Field(
        key="evaluation_freq",
        paths=("evaluation_freq",),
        kind=Kind.INTEGER,
        group="evaluation",
        minimum=1,
        maximum=10_000_000,
        usual=(50, 1000),
    ),
    Field(key="evaluation_inputs", paths=("evaluation_inputs",), kind=Kind.LINES, group="evaluation"),
    Field(
        key="max_new_tokens",
        paths=(f"{_CHAT_HOOK}.max_new_tokens",),
        kind=Kind.INTEGER,
        group="evaluation",
        minimum=1,
        maximum=8192,
        usual=(32, 600),
        may_add=True,
        default=600,
    ),
    Field(key="system", paths=("SYSTEM",), kind=Kind.TEXT, group="evaluation"),
)
GROUPS: Final = ("model", "data", "training", "lora", "saving", "evaluation")
