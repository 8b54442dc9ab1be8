"""Whether the installed XTuner can train a model, and what the model lacks there. Reads packages' source by ast, imports none.

XTuner loads a base model with transformers' AutoModelForCausalLM, so what that knows (or what brings its own code) trains. For
the architectures in its dispatch table XTuner has its own attention; the others train with transformers' own.
"""

import ast
import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Final

from core.messages import Message, message
from core.models.inspect import ModelCard
from core.xtuner.tokens import guess_template

_DISPATCH: Final = ("xtuner", "model/modules/dispatch/__init__.py", "LOWEST_TRANSFORMERS_VERSION")
_CAUSAL: Final = ("transformers", "models/auto/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
_CAUSAL_ENDINGS: Final = ("ForCausalLM", "LMHeadModel")


class Level(StrEnum):
    """How well XTuner knows a model."""

    TUNED = "tuned"
    """XTuner has its own attention for it: packed rows can be kept apart (`use_varlen_attn`)."""
    PLAIN = "plain"
    """It trains, with transformers' own attention."""
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"
    """XTuner or transformers is not installed here, so nobody can say."""


@dataclass(frozen=True, slots=True)
class Support:
    """What XTuner makes of one model."""

    level: Level
    template: str | None
    """The prompt template of XTuner that fits; None: none is known to."""
    lacks: tuple[Message, ...]
    """What is missing or has to be done first, in the order of weight."""


def support(card: ModelCard) -> Support:
    """What the XTuner and transformers installed beside the app make of `card`."""
    template = guess_template(card.path)
    lacks = []
    level = _level(card)
    if level is Level.UNSUPPORTED:
        is_known = card.model_type in _pairs(*_CAUSAL)
        key = "not_causal" if is_known or not _is_causal_name(card.architecture) else "unknown_architecture"
        lacks.append(
            message(f"models.support.{key}", architecture=card.architecture or "-", type=card.model_type or "-")
        )
    if card.needs_remote_code:
        lacks.append(message("models.support.remote_code"))
    if template is None:
        lacks.append(message("models.support.no_template"))
    return Support(level, template, tuple(lacks))


def _level(card: ModelCard) -> Level:
    causal, tuned = _pairs(*_CAUSAL), _pairs(*_DISPATCH)
    if not causal or not tuned:
        return Level.UNKNOWN
    if card.needs_remote_code:
        is_trainable = True
    else:
        is_trainable = card.model_type in causal and (
            card.architecture == causal[card.model_type] or _is_causal_name(card.architecture)
        )
    if not is_trainable:
        return Level.UNSUPPORTED
    return Level.TUNED if card.architecture in tuned else Level.PLAIN


def _is_causal_name(architecture: str | None) -> bool:
    return architecture is not None and architecture.endswith(_CAUSAL_ENDINGS)


@cache
def _pairs(package: str, place: str, name: str) -> dict[str, str]:
    """The table `name` of a module of an installed package, `dict(a=…)` or `OrderedDict([(a, b), …])`; empty without it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return {}
    file = Path(next(iter(found.submodule_search_locations))) / place
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    call = next((node.value for node in tree.body if isinstance(node, ast.Assign) and _names(node) == name), None)
    if not isinstance(call, ast.Call):
        return {}
    pairs = {keyword.arg: "" for keyword in call.keywords if keyword.arg}
    for argument in call.args:
        if isinstance(argument, ast.List):
            pairs |= {_text(item.elts[0]): _text(item.elts[1]) for item in argument.elts if isinstance(item, ast.Tuple)}
    return pairs


def _names(node: ast.Assign) -> str:
    target = node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def _text(node: ast.expr) -> str:
    value = node.value if isinstance(node, ast.Constant) else ast.unparse(node)
    return str(value)
