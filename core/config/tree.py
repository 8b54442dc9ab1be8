"""The syntax tree of a config and where its parts stand in the text. Knows places and spans; changes and runs nothing."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from core.errors import InputError

MAX_BYTES: Final = 1_000_000
"""XTuner's largest config has 13 kB; a megabyte is no config."""
_MAX_FOLLOWED_NAMES: Final = 20
_STEP: Final = re.compile(r"\.?([A-Za-z_]\w*)|\[([A-Za-z_]\w*|\d+)\]")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a path: `.key`, `[index]` or `[TypeName]` (the list item whose `type` is that)."""

    name: str
    is_item: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where one value stands. Offsets are bytes of the UTF-8 text."""

    node: ast.expr
    start: int
    end: int
    """Of the value, with the parentheses around it."""
    entry_start: int
    entry_end: int
    """Of `key=value` in its container; of the statement for a variable."""
    container: ast.expr | None
    """The call, dict, list or tuple that holds it; None for a variable of the module."""


def parse_path(path: str) -> list[Step]:
    """`custom_hooks[EvaluateChatHook].max_new_tokens` → its steps. Raises ValueError: paths come from code, not from people."""
    steps, at = [], 0
    while at < len(path):
        found = _STEP.match(path, at)
        if found is None or (at == 0) != (path[at] not in ".["):
            raise ValueError(f"not a path: {path!r}")
        steps.append(Step(found[1] or found[2], is_item=found[1] is None))
        at = found.end()
    return steps


class Tree:
    """A parsed config. Raises InputError `config.syntax` (line, column), `config.too_large`, `config.not_text`."""

    def __init__(self, text: str) -> None:
        self.data = text.encode("utf-8", errors="surrogatepass")
        if len(self.data) > MAX_BYTES:
            raise InputError("config.too_large", size_kib=len(self.data) // 1024, limit_kib=MAX_BYTES // 1024)
        if "\0" in text:
            raise InputError("config.not_text", line=text[: text.index("\0")].count("\n") + 1)
        body = text.removeprefix("\ufeff")
        self._mark_bytes = 3 * (len(text) - len(body))
        self.module = _parse(body)
        self._line_starts = [0, *(found.end() for found in re.finditer(rb"\r\n|\r|\n", self.data))]
        self.newline = "\r\n" if b"\r\n" in self.data else "\n"

    def offset(self, line: int, column: int) -> int:
        """Byte offset of a line (from 1) and column (UTF-8 bytes, from 0) as `ast` counts them."""
        return self._line_starts[line - 1] + column + (self._mark_bytes if line == 1 else 0)

    def line_start(self, offset: int) -> int:
        """Offset of the beginning of the line that holds `offset`."""
        return max(self.data.rfind(b"\n", 0, offset), self.data.rfind(b"\r", 0, offset)) + 1

    def line_number(self, offset: int) -> int:
        return len(re.findall(rb"\r\n|\r|\n", self.data[:offset])) + 1

    def span(self, node: ast.expr | ast.stmt | ast.keyword | ast.alias) -> tuple[int, int]:
        """First byte of a node and the one after its last."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def text(self, start: int, end: int) -> str:
        return self.data[start:end].decode("utf-8", errors="surrogatepass")

    def variable(self, name: str) -> Place | None:
        """The last plain assignment to a variable of the module."""
        for statement in reversed(self.module.body):
            target, value = assigned(statement)
            if value is not None and target is not None and target.id == name:
                start, end = self.span(statement)
                after_name = target if isinstance(statement, ast.Assign) else statement.annotation  # type: ignore[attr-defined]
                return Place(value, self._after_equals(self.span(after_name)[1]), end, start, end, None)
        return None

    @cached_property
    def names_read(self) -> frozenset[str]:
        """Every name that some expression of the module uses."""
        nodes = (node for node in ast.walk(self.module) if isinstance(node, ast.Name))
        return frozenset(node.id for node in nodes if isinstance(node.ctx, ast.Load))

    def variables(self) -> list[str]:
        """Names assigned in the module, in the order of the text, once each."""
        names = (assigned(statement)[0] for statement in self.module.body)
        return list(dict.fromkeys(name.id for name in names if name is not None))

    def children(self, container: ast.expr) -> Iterator[tuple[str | None, Place]]:
        """Entries of a call, dict, list or tuple: (key or None, place)."""
        if isinstance(container, ast.Call):
            for keyword in container.keywords:
                start, end = self.span(keyword)
                name_end = start + len((keyword.arg or "*").encode())
                value_start = self._after_equals(name_end) if keyword.arg else start + 2
                yield keyword.arg, Place(keyword.value, value_start, end, start, end, container)
        elif isinstance(container, ast.Dict):
            for key, value in zip(container.keys, container.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None
                start, end = self.span(value)
                yield name, Place(value, start, end, self.span(key)[0] if key else start, end, container)
        elif isinstance(container, ast.List | ast.Tuple):
            for item in container.elts:
                start, end = self.span(item)
                yield None, Place(item, start, end, start, end, container)

    def follow(self, place: Place) -> Place:
        """Where a value that is only the name of a variable really stands (`dataset=alpaca_en` → `alpaca_en = dict(…)`)."""
        for _ in range(_MAX_FOLLOWED_NAMES):
            if not isinstance(place.node, ast.Name):
                break
            variable = self.variable(place.node.id)
            if variable is None:
                break
            place = variable
        return place

    def find(self, path: Sequence[Step]) -> Place | None:
        """The place of a path with names followed on the way, not at its end. None if there is none.

        `train_dataset` means `train_dataloader.dataset` where no variable has that name.
        """
        first, *rest = path
        place = self.variable(first.name)
        if place is None and first.name == "train_dataset":
            place = self.find([Step("train_dataloader", False), Step("dataset", False)])
        for step in rest:
            if place is None:
                return None
            place = self._child(self.follow(place).node, step)
        return place

    def _child(self, container: ast.expr, step: Step) -> Place | None:
        entries = list(self.children(container))
        if not step.is_item:
            return next((place for key, place in entries if key == step.name), None)
        if step.name.isdigit():
            return entries[int(step.name)][1] if int(step.name) < len(entries) else None
        return next((place for _, place in entries if self.type_name(self.follow(place).node) == step.name), None)

    def type_name(self, node: ast.expr) -> str | None:
        """`EvaluateChatHook` of `dict(type=EvaluateChatHook, …)`; the last part of a dotted name or string."""
        kind = self._child(node, Step("type", False))
        if kind is None:
            return None
        if isinstance(kind.node, ast.Constant):
            return str(kind.node.value).rpartition(".")[2]
        return ast.unparse(kind.node).rpartition(".")[2]

    def _after_equals(self, offset: int) -> int:
        found = re.compile(rb"\s*\)*\s*=\s*").match(self.data, offset)
        assert found is not None
        return found.end()


def assigned(statement: ast.stmt) -> tuple[ast.Name | None, ast.expr | None]:
    """Name and value of `name = value`; (None, None) for any other statement."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0], statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target, statement.value
    return None, None


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        line, column = error.lineno or 1, error.offset or 1
        raise InputError("config.syntax", line=line, column=column, reason=error.msg) from error
    except (RecursionError, MemoryError, ValueError) as error:
        raise InputError("config.syntax", line=1, column=1, reason=str(error) or type(error).__name__) from error
