"""Checks of the text as Python reads it: marks, names and imports. What does not parse at all never comes here."""

import ast
import builtins
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Final

from core.config.edits import rename
from core.config.findings import Check, Context, Finding, Severity, found
from core.config.imports import KNOWN_NAMES, bound_names, bring_in
from core.config.source import ConfigSource

_MARK: Final = "\ufeff"


def check_mark(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """mmengine stops at the byte order mark that editors of Windows put first: `invalid non-printable character U+FEFF`."""
    del context
    if source.text.startswith(_MARK):
        fix = lambda edited: ConfigSource(edited.text.removeprefix(_MARK))  # noqa: E731
        yield found("byte_order_mark", Severity.ERROR, line=1, fix=fix)


def check_names(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Variables `input` and `round` collide with the fields of the prompt template in XTuner's chat hook."""
    del context
    for name in ("input", "round"):
        if source.has(name):
            fix = partial(rename, name=name, new=f"{name}_")
            yield found("reserved_name", Severity.ERROR, line=source.line_of(name), fix=fix, name=name, new=f"{name}_")


def check_imports(source: ConfigSource, context: Context) -> Iterator[Finding]:
    """Every imported package is installed, and every name of a map function or class is bound."""
    del context
    for statement in source.tree.module.body:
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.level == 0:
            package = statement.module.partition(".")[0]
            if importlib.util.find_spec(package) is None:
                yield found("package_missing", Severity.ERROR, line=statement.lineno, package=package)
    bound = bound_names(source.tree) | set(dir(builtins))
    bound |= {
        node.id
        for node in ast.walk(source.tree.module)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    bound |= {node.arg for node in ast.walk(source.tree.module) if isinstance(node, ast.arg)}
    for node in ast.walk(source.tree.module):
        if isinstance(node, ast.Name) and node.id not in bound:
            is_known = node.id in KNOWN_NAMES
            fix = partial(_import, name=node.id) if is_known else None
            yield found("unknown_name", Severity.ERROR, line=node.lineno, fix=fix, name=node.id)
            bound.add(node.id)


TEXT_CHECKS: Final[tuple[Check, ...]] = (check_mark, check_imports, check_names)


def _import(source: ConfigSource, *, name: str) -> ConfigSource:
    return ConfigSource(bring_in(source.text, name))
