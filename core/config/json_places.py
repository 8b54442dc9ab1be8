"""Where each key of a JSON text stands, so that a check can name line and column. Knows no schema."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from core.errors import InputError

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
Place = tuple[int, int]
"""Line and column, from 1."""


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A JSON object and the places of its keys, by path: `zero_optimization.stage`."""

    values: dict[str, Any]
    places: dict[str, Place]

    def place(self, path: str) -> Place:
        """Of a key, else of the nearest object around it that has one; line 1 for the whole."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places.get(path, (1, 1))


def read_object(text: str) -> JsonObject:
    """The object in `text`. Raises InputError `deepspeed.broken_json` or `deepspeed.key_twice` with line and column."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError("deepspeed.broken_json", line=error.lineno, column=error.colno, reason=error.msg) from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        raise InputError("deepspeed.broken_json", line=1, column=1, reason=str(error)) from error
    if not isinstance(values, dict):
        raise InputError("deepspeed.no_object", kind=type(values).__name__)
    places: dict[str, Place] = {}
    for path, offset in _keys(text):
        if path in places:
            raise InputError("deepspeed.key_twice", key=path, line=_place(text, offset)[0], first=places[path][0])
        places[path] = _place(text, offset)
    return JsonObject(values, places)


def _keys(text: str) -> Iterator[tuple[str, int]]:
    """Path and offset of every key, in the order of the text, which is whole JSON. List items count as `[0]`, `[1]`, …"""
    stack: list[tuple[str, int | None]] = []
    """What is open: its path, and the number of its next item if it is a list."""
    name = ""
    tokens = list(_TOKEN.finditer(text))
    for number, token in enumerate(tokens):
        sign = token.group()
        if sign in "{[":
            stack.append((name, 0 if sign == "[" else None))
        elif sign in "}]":
            stack.pop()
        elif sign.startswith('"') and number + 1 < len(tokens) and tokens[number + 1].group() == ":":
            name = _join(stack[-1][0], str(json.loads(sign)))
            yield name, token.start()
        if stack and stack[-1][1] is not None and sign in "[,":
            path, count = stack[-1]
            name = f"{path}[{count}]"
            stack[-1] = (path, (count or 0) + 1)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _place(text: str, offset: int) -> Place:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
