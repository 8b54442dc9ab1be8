"""What the form shows of a config: each field's place in the source, its type, its range and what is usual."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from core.config.source import ConfigSource
from core.config.values import Code
from core.errors import InputError
from core.xtuner.templates import prompt_templates


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
_PARENTS_NEEDED: Final = {field.key: field.paths[0].rpartition(".")[0] for field in FIELDS if field.may_add}


@dataclass(frozen=True, slots=True)
class Filled:
    """A field with what the config says."""

    field: Field
    path: str
    value: Any
    """Plain value or `Code`; the field's default where the config is silent."""
    line: int | None
    """Where it stands; None if it does not yet."""

    @property
    def is_editable(self) -> bool:
        """An expression that is no plain value can only be edited in the source, unless it is one of the choices."""
        return not isinstance(self.value, Code) or self.field.kind is Kind.CHOICE or self.field.key == "system"


def fill(source: ConfigSource) -> list[Filled]:
    """The fields that apply to this config, with their values, in the order of the form."""
    filled = []
    for field in FIELDS:
        path = next((path for path in field.paths if source.has(path)), None)
        if path is not None:
            filled.append(Filled(field, path, source.get(path), source.line_of(path)))
        elif field.may_add and source.has(_PARENTS_NEEDED[field.key]):
            filled.append(Filled(field, field.paths[0], field.default, None))
    return filled


def choices(field: Field) -> tuple[str, ...]:
    """What a choice may be; prompt templates are those of the installed XTuner."""
    return tuple(prompt_templates()) if field.key == "prompt_template" else field.choices


def shown(filled: Filled) -> Any:
    """The value as the form shows it: `qwen_chat` for `PROMPT_TEMPLATE.qwen_chat`, the text of other expressions."""
    if filled.field.key == "prompt_template":
        return str(filled.value).removeprefix("PROMPT_TEMPLATE.")
    return str(filled.value) if isinstance(filled.value, Code) else filled.value


def write(source: ConfigSource, filled: Filled, value: Any) -> ConfigSource:
    """The config with a field set to what a person entered. Raises InputError `config.out_of_range`, `config.not_a_choice`."""
    field = filled.field
    if field.kind is Kind.CHOICE:
        return source.set(filled.path, _choice(field, str(value)))
    if field.kind in (Kind.INTEGER, Kind.NUMBER):
        low, high = field.minimum, field.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise InputError("config.out_of_range", field=field.key, value=value, low=low, high=high)
        value = (
            int(value)
            if field.kind is Kind.INTEGER or (float(value).is_integer() and isinstance(filled.value, int))
            else float(value)
        )
    elif field.kind is Kind.LINES:
        value = [str(line) for line in value]
    elif field.key == "system":
        value = Code(value) if value.startswith("SYSTEM_TEMPLATE.") else value
    return source.set(filled.path, value)


def _choice(field: Field, value: str) -> Any:
    allowed = choices(field)
    if value not in allowed:
        raise InputError("config.not_a_choice", field=field.key, value=value, choices=", ".join(allowed))
    if field.key == "prompt_template":
        return Code(f"PROMPT_TEMPLATE.{value}")
    return Code(value) if value.startswith("torch.") else value
