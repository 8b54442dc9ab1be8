"""Elements of a JSON list, or JSON objects in a row, one by one from a stream. Holds one element and one block in memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

Element = tuple[int, Any, tuple[str, dict[str, Any]] | None]
"""(line, value, None), or (line, None, (code of a finding, params))."""

MAX_ELEMENT_CHARACTERS: Final = 64 * 2**20
_BLOCK_BYTES: Final = 2**18
_MOST_TRIES: Final = 2000
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_NEXT_OBJECT: Final = re.compile(r"\}\s*,?\s*(\{)")


class _Undecodable(Exception):
    """Bytes that are no text."""


class _Window:
    """The part of the text that is being looked at, with line and column of its beginning."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._read_bytes = 0
        self._bad_offset: int | None = None
        self.text = ""
        self.at = 0
        self.is_end = False
        self.found: tuple[int, Any] = (0, None)
        self._line = 1
        self._column = 1

    def fill(self) -> bool:
        """Read one block more, forgetting what was consumed. False at the end of the stream."""
        if self.is_end:
            return False
        if self._bad_offset is not None:
            raise _Undecodable(str(self._bad_offset))
        raw = self._stream.read(max(_BLOCK_BYTES, (len(self.text) - self.at) // 2))
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:  # what comes before the bad bytes is still read
            more = bytes(error.object[: error.start]).decode(error.encoding)
            self._bad_offset = self._read_bytes + len(raw) - len(error.object) + error.start
        if self._read_bytes == 0:
            more = more.removeprefix("\ufeff")
        self._read_bytes += len(raw)
        self.is_end = not raw and self._bad_offset is None
        self._line, self._column = self.place(self.at)
        self.text = self.text[self.at :] + more
        self.at = 0
        return True

    def place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of position `at` of the text."""
        breaks = self.text.count("\n", 0, at)
        if breaks == 0:
            return self._line, self._column + at
        return self._line + breaks, at - self.text.rfind("\n", 0, at)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def decode(self) -> Any:
        """The value that begins here. Raises JSONDecodeError whose position is in the present text, RecursionError, ValueError."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if is_cut and len(self.text) - self.at < MAX_ELEMENT_CHARACTERS and self.fill():
                    continue
                raise
            if end == len(self.text) and not isinstance(value, (dict, list, str)) and self.fill():
                continue
            self.at = end
            return value

    def skip_to_next(self, known: set[str]) -> bool:
        """Read the next object that has a key of `known` (the rows so far) into `found`. False if there is none nearby."""
        for _ in range(_MOST_TRIES):
            found = _NEXT_OBJECT.search(self.text, self.at)
            if found is None:
                self.at = max(self.at, len(self.text) - 4096)
                if not self.fill():
                    return False
                continue
            self.at = found.start(1)
            start = self.place(self.at)
            try:
                value = self.decode()
            except (ValueError, RecursionError):
                self.at = min(self.at + 1, len(self.text))
                continue
            if isinstance(value, dict) and known & value.keys():
                self.found = (start[0], value)
                return True
        return False


def read_array(stream: BinaryIO, encoding: str = "utf-8") -> Iterator[Element]:
    """Elements of the list that `stream` holds. After a broken one it goes on at the next that looks like the ones before."""
    window = _Window(stream, encoding)
    try:
        yield from _array(window)
    except _Undecodable as error:
        yield window.place(len(window.text))[0], None, ("not_utf8", {"offset": int(str(error))})


def read_objects(stream: BinaryIO, encoding: str = "utf-8") -> Iterator[Element]:
    """Objects one after the other. One single object that holds a list of objects stands for these (with a note)."""
    window = _Window(stream, encoding)
    try:
        yield from _objects(window)
    except _Undecodable as error:
        yield window.place(len(window.text))[0], None, ("not_utf8", {"offset": int(str(error))})


def _array(window: _Window) -> Iterator[Element]:
    window.peek()
    window.at += 1
    known: set[str] = set()
    needs_comma = False
    while (mark := window.peek()) != "]":
        line, column = window.place(window.at)
        if mark == "":
            yield line, None, ("cut_off", {})
            return
        if needs_comma and mark == ",":
            window.at += 1
            if window.peek() == "]":
                yield line, None, ("trailing_comma", {"column": column})
            needs_comma = False
            continue
        if needs_comma:
            yield line, None, ("broken_json", {"column": column, "reason": "Expecting ',' delimiter"})
        value, problem = _element(window, line) if mark == "{" or not needs_comma else (None, ("", {}, line))
        needs_comma = True
        if problem is None:
            yield line, value, None
            known |= value.keys() if isinstance(value, dict) else set()
            continue
        if problem[0]:
            yield problem[2], None, problem[:2]
        if problem[0] == "cut_off" or not window.skip_to_next(known):
            return
        yield window.found[0], window.found[1], None
    window.at += 1
    if window.peek():
        line, column = window.place(window.at)
        yield line, None, ("broken_json", {"column": column, "reason": "Extra data"})


def _objects(window: _Window) -> Iterator[Element]:
    count = 0
    first: Element | None = None
    while window.peek():
        line = window.place(window.at)[0]
        value, problem = _element(window, line)
        if problem is not None:
            if first is not None:
                yield first
            yield problem[2], None, problem[:2]
            return
        count += 1
        if count == 1:
            first = (line, value, None)
            continue
        if first is not None:
            yield first
            first = None
        yield line, value, None
    if first is not None:
        yield from _unwrap(first)


def _unwrap(first: Element) -> Iterator[Element]:
    line, value, _ = first
    lists = (
        {}
        if not isinstance(value, dict)
        else {
            name: rows
            for name, rows in value.items()
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
        }
    )
    nested = {"messages", "conversation", "conversations"}
    name = next((name for name in lists if name not in nested), None)
    if name is None:
        yield first
        return
    yield line, None, ("wrapped_rows", {"key": str(name)})
    for row in lists[name]:
        yield line, row, None


def _element(window: _Window, line: int) -> tuple[Any, tuple[str, dict[str, Any], int] | None]:
    try:
        return window.decode(), None
    except json.JSONDecodeError as error:
        if window.is_end and (error.pos >= len(window.text.rstrip()) or error.msg.startswith("Unterminated string")):
            return None, ("cut_off", {}, line)
        where, column = window.place(error.pos)
        window.at = max(window.at, min(error.pos, len(window.text)))
        return None, ("broken_json", {"column": column, "reason": error.msg}, where)
    except RecursionError:
        return None, ("too_deep", {}, line)
    except ValueError as error:
        return None, ("broken_json", {"column": 1, "reason": str(error)[:120]}, line)
