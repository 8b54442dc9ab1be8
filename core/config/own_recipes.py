"""A person's own recipes: what they changed in one config, kept under a name, shared as a file, applied to another config.

A recipe file may come from anybody, and its values end in a config, which is code: only literals and known names are let in.
"""

import ast
import json
import re
from dataclasses import dataclass
from typing import Any, Final

from core.config import fields
from core.config.field_table import FIELDS
from core.config.imports import KNOWN_NAMES
from core.config.recipes import Step
from core.config.source import ConfigSource
from core.config.tree import parse_path
from core.config.values import Code
from core.errors import ConflictError, InputError
from core.files import read_json, write_json
from core.messages import message
from core.project import Project

SCHEMA_VERSION: Final = 1
_NAME: Final = re.compile(r"[^\W_][\w .-]{0,63}", re.UNICODE)
_OF_THIS_MACHINE: Final = frozenset({"model_path", "map_num_proc"})
"""Fields that say where things lie or how many cores there are: no part of a recipe."""
_NAMESPACES: Final = frozenset({"PROMPT_TEMPLATE", "SYSTEM_TEMPLATE", "torch"})
_MAX_EDITS: Final = 200


@dataclass(frozen=True, slots=True)
class Change:
    """One place and the value it gets, as source text."""

    path: str
    value: str


@dataclass(frozen=True, slots=True)
class OwnRecipe:
    """A name and its changes."""

    name: str
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        edits = [{"path": change.path, "value": change.value} for change in self.changes]
        return {"schema_version": SCHEMA_VERSION, "name": self.name, "edits": edits}


def record(name: str, before: ConfigSource, after: ConfigSource) -> OwnRecipe:
    """What the fields of the form say differently in `after`. Raises InputError `config.bad_recipe_name`, `config.empty_recipe`."""
    _check_name(name)
    old = {filled.field.key: fields.shown(filled) for filled in fields.fill(before)}
    changes = [
        Change(filled.path, after.written(filled.path))
        for filled in fields.fill(after)
        if filled.line is not None
        and filled.field.key not in _OF_THIS_MACHINE
        and fields.shown(filled) != old.get(filled.field.key)
        and _is_harmless(after.written(filled.path))
    ]
    if not changes:
        raise InputError("config.empty_recipe")
    return OwnRecipe(name, tuple(changes))


def steps(recipe: OwnRecipe) -> list[Step]:
    """Its changes as steps; a place that a config does not have is left alone, unless its dict is there to take it."""
    return [
        Step(message("config.recipe.own", path=change.path, value=change.value), _Setter(change.path, change.value))
        for change in recipe.changes
    ]


@dataclass(frozen=True, slots=True)
class _Setter:
    path: str
    value: str

    def __call__(self, source: ConfigSource) -> ConfigSource:
        parent = self.path.rpartition(".")[0]
        if not source.has(self.path) and not (parent and source.has(parent)):
            return source
        value = _literal(self.value)
        return source.set(self.path, value)


def read_recipe(data: bytes) -> OwnRecipe:
    """A recipe from a shared file. Raises InputError `config.bad_recipe` with the reason."""
    try:
        value = json.loads(data.decode("utf-8"))
        name, edits = str(value["name"]), list(value["edits"])
        changes = tuple(Change(str(edit["path"]), str(edit["value"])) for edit in edits[:_MAX_EDITS])
        version = int(value["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("config.bad_recipe", reason=f"{type(error).__name__}: {error}") from error
    if version > SCHEMA_VERSION:
        raise InputError("config.bad_recipe", reason=f"schema_version {version}")
    _check_name(name)
    for change in changes:
        if not _is_place(change.path) or not _is_harmless(change.value):
            raise InputError("config.bad_recipe", reason=f"{change.path} = {change.value}"[:200])
    return OwnRecipe(name, changes)


def save_recipe(project: Project, recipe: OwnRecipe) -> None:
    """Keep it in the project. Raises ConflictError `config.recipe_exists` if another one has its name."""
    file = project.private / "recipes" / f"{recipe.name}.json"
    if file.exists() and read_recipe(file.read_bytes()) != recipe:
        raise ConflictError("config.recipe_exists", name=recipe.name)
    write_json(file, recipe.to_json())


def delete_recipe(project: Project, name: str) -> None:
    _check_name(name)
    (project.private / "recipes" / f"{name}.json").unlink(missing_ok=True)


def list_recipes(project: Project) -> list[OwnRecipe]:
    """Those of the project by name; a file that cannot be read is passed over."""
    found = []
    for file in sorted((project.private / "recipes").glob("*.json")):
        try:
            found.append(read_recipe(json.dumps(read_json(file)).encode()))
        except InputError:
            continue
    return found


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError("config.bad_recipe_name", name=name)


def _is_place(path: str) -> bool:
    """Only places that the form edits."""
    try:
        parse_path(path)
    except ValueError:
        return False
    return any(path in field.paths for field in FIELDS)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return Code(text)


def _is_harmless(text: str) -> bool:
    """Whether it is a literal, a known name, or `torch.x`, `PROMPT_TEMPLATE.x`, `SYSTEM_TEMPLATE.x`."""
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if isinstance(node, ast.Name):
        return node.id in KNOWN_NAMES
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id in _NAMESPACES and not node.attr.startswith("_")
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False
    return True
