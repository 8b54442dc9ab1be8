"""What the form shows of a config: the fields that apply to it with their values, and how a value that was entered is written."""

from dataclasses import dataclass
from typing import Any, Final

from core.config.field import Field, Kind
from core.config.field_table import DTYPES, FIELDS, GROUPS, OPTIMIZERS
from core.config.imports import is_used
from core.config.source import ConfigSource
from core.config.values import Code
from core.errors import InputError
from core.xtuner.templates import prompt_templates

__all__ = ["DTYPES", "FIELDS", "GROUPS", "Field", "Filled", "Kind", "choices", "fill", "shown", "write"]
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
    """The fields that apply to this config, with their values, in the order of the form.

    A variable that nothing reads (`save_steps` of XTuner's speed benchmarks, which never save) is none: setting it changes nothing.
    """
    filled = []
    for field in FIELDS:
        path = next((path for path in field.paths if source.has(path) and _is_read(source, path)), None)
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
        # No names at all mean that XTuner looks for the layers itself.
        value = [str(line) for line in value] or (None if field.key == "lora_targets" else [])
    elif field.key == "system":
        value = Code(value) if value.startswith("SYSTEM_TEMPLATE.") else value
    return source.set(filled.path, value)


def _is_read(source: ConfigSource, path: str) -> bool:
    return "." in path or is_used(source.tree, path.partition("[")[0])


def _choice(field: Field, value: str) -> Any:
    allowed = choices(field)
    if value not in allowed:
        raise InputError("config.not_a_choice", field=field.key, value=value, choices=", ".join(allowed))
    if field.key == "prompt_template":
        return Code(f"PROMPT_TEMPLATE.{value}")
    return Code(value) if value.startswith("torch.") or value in OPTIMIZERS else value
