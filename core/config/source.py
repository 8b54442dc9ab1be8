"""A config as text that a person owns: reads and changes single places, keeps every other byte. Never runs it."""

import ast
import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from core.config import imports
from core.config.tree import Place, Tree, parse_path
from core.config.values import Code, evaluate, format_value
from core.errors import InputError

_MISSING: Final = object()


@dataclass(frozen=True)
class ConfigSource:
    """One version of a config's text. Edits return a new one.

    Paths: `lr`, `model.lora.r`, `train_dataset.dataset_map_fn`, `custom_hooks[EvaluateChatHook].max_new_tokens`, `param_scheduler[0].end`.
    Variables are followed: `train_dataloader.dataset.max_length` leads to `max_length = 2048`.
    """

    text: str

    def __post_init__(self) -> None:
        self.tree  # noqa: B018 - a text that does not parse is refused here, with its line

    @cached_property
    def tree(self) -> Tree:
        """The parsed text. Raises InputError `config.syntax` with line and column."""
        return Tree(self.text)

    def has(self, path: str) -> bool:
        return self.tree.find(parse_path(path)) is not None

    def get(self, path: str, default: Any = _MISSING) -> Any:
        """The value at a path: a plain value, or `Code` for an expression. Raises InputError `config.no_such_place`."""
        place = self._find(path)
        if place is None:
            if default is _MISSING:
                raise InputError("config.no_such_place", path=path)
            return default
        return evaluate(self.tree, place.node)

    def effective(self, path: str, default: Any = None) -> Any:
        """Like get, after `*=` and `+=` on the variable: what training uses."""
        place = self.tree.find(parse_path(path))
        if place is None:
            return default
        if place.container is None and "." not in path and "[" not in path:
            return evaluate(self.tree, ast.Name(path))
        return evaluate(self.tree, place.node)

    def written(self, path: str, *, follow: bool = True) -> str:
        """The source text of the value at a path. Raises InputError `config.no_such_place`."""
        place = self._find(path) if follow else self.tree.find(parse_path(path))
        if place is None:
            raise InputError("config.no_such_place", path=path)
        return self.tree.text(place.start, place.end)

    def variable_at(self, path: str) -> str | None:
        """The variable whose value stands at a path (`alpaca_en_path` for `path=alpaca_en_path`); None if there is none."""
        place = self.tree.find(parse_path(path))
        if place is None or not isinstance(place.node, ast.Name) or self.tree.variable(place.node.id) is None:
            return None
        return place.node.id

    def line_of(self, path: str) -> int | None:
        """Line (from 1) on which the value at a path begins."""
        place = self._find(path)
        return None if place is None else self.tree.line_number(place.start)

    def type_name(self, path: str) -> str | None:
        """`SupervisedFinetune` for `model`: the last part of the `type` of the dict at a path."""
        place = self._find(path)
        return None if place is None else self.tree.type_name(place.node)

    def set(self, path: str, value: Any, *, follow: bool = True) -> "ConfigSource":
        """The config with another value at a path; a key that its dict lacks is added at the end of it.

        `value`: a plain value, or `Code`. Names that `Code` brings in are imported, names it drops are dropped from the imports.
        `follow=False` replaces `lr=lr` itself instead of the variable. Raises InputError `config.no_such_place`, `config.bad_expression`.
        """
        needed = _names(value)
        place = self._find(path) if follow else self.tree.find(parse_path(path))
        if place is None:
            text, dropped = self._add(path, value), set()
        else:
            old = self.tree.text(place.start, place.end)
            before = evaluate(self.tree, place.node)
            is_other_kind = isinstance(value, bool) is not isinstance(
                before, bool
            )  # True == 1, but they are not written alike.
            if value == before and not isinstance(value, Code) and not is_other_kind:
                return self
            indent = self._indent(place.start)
            new = format_value(value, old).replace("\n", self.tree.newline + indent)
            text = self._spliced(place.start, place.end, new)
            dropped = {node.id for node in ast.walk(place.node) if isinstance(node, ast.Name)}
        for name in sorted(needed):
            swapped = next((old_name for old_name in sorted(dropped) if _is_sibling(old_name, name)), None)
            text = imports.bring_in(text, name, instead_of=swapped)
        if needed:
            for name in sorted((dropped - needed) & imports.KNOWN_NAMES.keys()):
                text = imports.drop_unused(text, name)
        return ConfigSource(text)

    def delete(self, path: str) -> "ConfigSource":
        """The config without the entry at a path, and without imports that nothing else uses. Raises InputError `config.no_such_place`."""
        place = self.tree.find(parse_path(path))
        if place is None:
            raise InputError("config.no_such_place", path=path)
        start, end = self._entry_span(place)
        text = self._spliced(start, end, "")
        for node in ast.walk(place.node):
            if isinstance(node, ast.Name) and node.id in imports.KNOWN_NAMES:
                text = imports.drop_unused(text, node.id)
        return ConfigSource(text)

    def _find(self, path: str) -> Place | None:
        place = self.tree.find(parse_path(path))
        return None if place is None else self.tree.follow(place)

    def _spliced(self, start: int, end: int, new: str) -> str:
        return self.tree.text(0, start) + new + self.tree.text(end, len(self.tree.data))

    def _indent(self, offset: int) -> str:
        line = self.tree.text(self.tree.line_start(offset), offset)
        return line[: len(line) - len(line.lstrip())]

    def _add(self, path: str, value: Any) -> str:
        """The text with a new `key=value` at the end of the dict that the path's last step belongs to."""
        parent_path, dot, key = path.rpartition(".")
        parent = self._find(parent_path) if dot else None
        if parent is None or not isinstance(parent.node, ast.Call | ast.Dict):
            raise InputError("config.no_such_place", path=path)
        entry = (
            f"{key}={format_value(value)}" if isinstance(parent.node, ast.Call) else f'"{key}": {format_value(value)}'
        )
        end = self.tree.span(parent.node)[1] - 1
        spans = [(place.entry_start, place.entry_end) for _, place in self.tree.children(parent.node)]
        if isinstance(parent.node, ast.Call):
            spans += [self.tree.span(argument) for argument in parent.node.args]
        last_start, last_end = max(spans, default=(parent.start, end))
        entry = entry.replace("\n", self.tree.newline + self._indent(last_start))
        if not spans:
            return self._spliced(end, end, entry)
        if self.tree.line_number(last_end) == self.tree.line_number(end):
            return self._spliced(last_end, last_end, f", {entry}")
        indent = self._indent(last_start)
        comma = _after_comma(self.tree.data, last_end)
        line = re.compile(rb"[^\r\n]*").match(self.tree.data, comma or last_end)
        assert line is not None
        note = self.tree.text(line.start(), line.end())  # The comment of the last entry stays with it.
        joined = note if comma else f",{note}"
        return self._spliced(line.start(), line.end(), f"{joined}{self.tree.newline}{indent}{entry},")

    def _entry_span(self, place: Place) -> tuple[int, int]:
        """What to cut: whole lines where the entry has its own, else the entry and the comma that joins it."""
        data, start, end = self.tree.data, place.entry_start, place.entry_end
        after = _after_comma(data, end) or end
        rest = re.compile(rb"[ \t]*(#[^\r\n]*)?(\r\n|\r|\n|\Z)").match(data, after)
        line_start = self.tree.line_start(start)
        if rest is not None and not data[line_start:start].strip():
            return line_start, rest.end()
        siblings = [] if place.container is None else [entry for _, entry in self.tree.children(place.container)]
        before = [entry.entry_end for entry in siblings if entry.entry_end <= start]
        behind = [entry.entry_start for entry in siblings if entry.entry_start >= end]
        if behind:
            return start, min(behind)
        return (max(before), end) if before else (start, after)


def diff(old: str, new: str, *, name: str = "config.py", context_lines: int = 2) -> str:
    """Unified diff of two texts; empty if they are the same."""
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}", n=context_lines
    )
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def _names(value: Any) -> set[str]:
    if isinstance(value, Code):
        try:
            return imports.names_in(value)
        except (SyntaxError, ValueError) as error:
            raise InputError("config.bad_expression", expression=str(value), reason=str(error)) from error
    if isinstance(value, dict):
        return set().union(*(_names(item) for item in value.values()))
    if isinstance(value, list | tuple):
        return set().union(*(_names(item) for item in value))
    return set()


def _is_sibling(old: str, new: str) -> bool:
    """Whether two names come from the same module, so that one may take the other's place in its import line."""
    return old != new and imports.KNOWN_NAMES.get(old) == imports.KNOWN_NAMES.get(new) is not None


def _after_comma(data: bytes, offset: int) -> int | None:
    found = re.compile(rb"(?:[ \t]*(?:#[^\r\n]*)?(?:\r\n|\r|\n))*[ \t]*,").match(data, offset)
    return None if found is None else found.end()
