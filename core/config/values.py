"""What an expression of a config is worth, found without running it; and how a value is written as source."""

import ast
import operator
from collections.abc import Callable
from typing import Any, Final

from core.config.tree import Tree, assigned

_MAX_DEPTH: Final = 60
_MAX_NUMBER: Final = 1e18
_NUMBER_OPERATORS: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class Code(str):
    """An expression as source text: what is not a plain value, such as `PROMPT_TEMPLATE.qwen_chat` or `torch.float16`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def evaluate(tree: Tree, node: ast.expr, depth: int = 0) -> Any:  # noqa: PLR0911 - one return a kind of node
    """The plain value of an expression with variables of the module put in; `Code` for each part that is none.

    A `dict(…)` call becomes a dict. Nothing is run: only literals, names, `+ - * / //` of small numbers, and lists joined by `+`.
    """
    if depth > _MAX_DEPTH:
        return Code(ast.unparse(node))
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            items = [evaluate(tree, item, depth + 1) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        case ast.Dict() if all(isinstance(key, ast.Constant) for key in node.keys):
            pairs = zip(node.keys, node.values, strict=True)
            return {
                key.value: evaluate(tree, value, depth + 1) for key, value in pairs if isinstance(key, ast.Constant)
            }
        case ast.Call(func=ast.Name(id="dict"), args=[]) if all(keyword.arg for keyword in node.keywords):
            return {keyword.arg: evaluate(tree, keyword.value, depth + 1) for keyword in node.keywords}
        case ast.Name():
            return variable_value(tree, node.id, depth + 1)
        case ast.UnaryOp(op=ast.USub()):
            value = evaluate(tree, node.operand, depth + 1)
            return -value if _is_number(value) else Code(ast.unparse(node))
        case ast.BinOp():
            left, right = evaluate(tree, node.left, depth + 1), evaluate(tree, node.right, depth + 1)
            return _compute(node.op, left, right, Code(ast.unparse(node)))
        case _:
            return Code(ast.unparse(node))


def variable_value(tree: Tree, name: str, depth: int = 0) -> Any:
    """The value a variable ends with: its assignments and `*=`, `+=` … in order. `Code(name)` if the module does not assign it."""
    value: Any = Code(name)
    for statement in tree.module.body:
        target, assigned_value = assigned(statement)
        if target is not None and target.id == name and assigned_value is not None:
            is_itself = any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(assigned_value))
            value = Code(ast.unparse(assigned_value)) if is_itself else evaluate(tree, assigned_value, depth + 1)
        elif (
            isinstance(statement, ast.AugAssign)
            and isinstance(statement.target, ast.Name)
            and statement.target.id == name
        ):
            value = _compute(statement.op, value, evaluate(tree, statement.value, depth + 1), Code(name))
    return value


def format_value(value: Any, old: str = "", *, width: int = 100) -> str:
    """`value` as source, in the manner of the text it replaces: its quotes, its way of writing small numbers.

    `Code` is written as it stands. Raises TypeError for what has no literal.
    """
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return repr(value)
    if isinstance(value, float):
        return _format_float(value, old)
    if isinstance(value, str):
        return quote(value, "'" if old.lstrip("([ \n").startswith("'") else '"')
    if isinstance(value, list | tuple):
        return _format_items(value, old, width)
    if isinstance(value, dict):
        entries = [f"{key}={format_value(item)}" for key, item in value.items()]
        line = f"dict({', '.join(entries)})"
        lines = "".join(f"    {entry},\n" for entry in entries)
        return line if len(line) <= width else f"dict(\n{lines})"
    raise TypeError(f"cannot be written in a config: {type(value).__name__}")


def quote(text: str, mark: str) -> str:
    """A one-line string literal with the given quotation mark; Chinese stays readable."""
    written = repr(text + ("'" if mark == '"' else '"'))
    # repr chooses the mark that the text lacks; the added one makes it choose ours, unless both occur.
    if written[0] == mark:
        return written[:-2] + mark
    inner = repr(text)[1:-1].replace("\\'", "'").replace('\\"', '"').replace(mark, "\\" + mark)
    return f"{mark}{inner}{mark}"


def _format_float(value: float, old: str) -> str:
    plain = repr(value)
    if "e" not in old.lower() and "e" not in plain:
        return plain
    mantissa, _, exponent = f"{value:.12e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if abs(value) < 0.01 or abs(value) >= 1e6 else plain


def _format_items(values: list[Any] | tuple[Any, ...], old: str, width: int) -> str:
    opening, closing = ("[", "]") if isinstance(values, list) else ("(", ")")
    items = [format_value(value, old) for value in values]
    line = ", ".join(items) + ("," if len(items) == 1 and closing == ")" else "")
    if len(line) + 2 <= width:
        return f"{opening}{line}{closing}"
    return f"{opening}\n" + "".join(f"    {item},\n" for item in items) + closing


def _compute(kind: ast.operator, left: Any, right: Any, otherwise: Code) -> Any:
    if isinstance(kind, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(kind, ast.Add) and isinstance(left, str) and isinstance(right, str):
        return otherwise if isinstance(left, Code) or isinstance(right, Code) else left + right
    compute = _NUMBER_OPERATORS.get(type(kind))
    if compute is None or not _is_number(left) or not _is_number(right) or max(abs(left), abs(right)) > _MAX_NUMBER:
        return otherwise
    try:
        return compute(left, right)
    except ZeroDivisionError:
        return otherwise


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
