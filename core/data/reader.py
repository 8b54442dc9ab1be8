"""Rows of a data file one by one, with their line numbers and in bounded memory, whatever is wrong with the file.

Reads JSONL, JSON (a list), CSV, TSV, Parquet and plain text. Knows nothing of what a row should hold.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from core.data.json_stream import read_array, read_objects
from core.errors import InputError

MAX_LINE_BYTES: Final = 64 * 2**20
"""A longer line or field is reported and skipped, never held."""
MAX_GROUP_BYTES: Final = 2 * 2**30
"""A Parquet row group that unpacks to more is refused (it would have to be held whole)."""
_SAMPLE_BYTES: Final = 2**20
_BATCH_ROWS: Final = 256
_decode = json.JSONDecoder().raw_decode


class Layout(StrEnum):
    """How rows lie in the file."""

    JSONL = "jsonl"
    ARRAY = "json"
    OBJECTS = "json objects"
    """JSON objects one after the other, spread over lines; or one object that holds the list of rows."""
    CSV = "csv"
    PARQUET = "parquet"
    TEXT = "text"
    """One row a line, as `{"text": line}`."""


class Row(NamedTuple):
    """One row as it was read."""

    line: int
    """Counted from 1. Of a Parquet file: number of the row."""
    value: Any
    raw: bytes | None = None
    """The bytes of the line, where a row is a line."""


class Broken(NamedTuple):
    """A place that cannot be read. `code` is one of `core.data.findings`."""

    line: int
    code: str
    params: dict[str, Any]


Item = Row | Broken


@dataclass(frozen=True, slots=True)
class Source:
    """How to read a file."""

    path: Path
    layout: Layout
    encoding: str = "utf-8"
    has_bom: bool = False
    delimiter: str = ","
    size_bytes: int = 0


def sniff(path: Path) -> Source:
    """How `path` is to be read, from its name and its first MiB. Raises InputError: missing, no file, an archive or a workbook."""
    if not path.exists():
        raise InputError("files.missing", path=str(path))
    if not path.is_file():
        raise InputError("data.not_a_file", path=str(path))
    with path.open("rb") as stream:
        head = stream.read(_SAMPLE_BYTES)
    size_bytes = path.stat().st_size
    if head[:4] == b"PAR1" or path.suffix.lower() == ".parquet":
        return Source(path, Layout.PARQUET, size_bytes=size_bytes)
    if head[:2] == b"PK" or head[:2] == b"\x1f\x8b" or head[:6] in (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"):
        raise InputError("data.archive", path=str(path))
    encoding, has_bom = _guess_encoding(head)
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head).lstrip("\ufeff")
    layout, delimiter = _guess_layout(path.suffix.lower(), text)
    return Source(path, layout, encoding, has_bom, delimiter, size_bytes)


def read_rows(source: Source, start: int = 0, end: int | None = None, first_line: int = 1) -> Iterator[Item]:
    """Rows and broken places in order. `start`, `end`: a byte range of UTF-8 JSONL at line ends, whose lines count from `first_line`."""
    match source.layout:
        case Layout.PARQUET:
            yield from _read_parquet(source.path)
        case Layout.CSV:
            yield from _read_csv(source)
        case Layout.TEXT:
            yield from _read_text(source)
        case Layout.ARRAY | Layout.OBJECTS:
            read = read_array if source.layout is Layout.ARRAY else read_objects
            with source.path.open("rb") as stream:
                for line, value, problem in read(stream, source.encoding):
                    yield Row(line, value) if problem is None else Broken(line, problem[0], problem[1])
        case Layout.JSONL:
            yield from _read_jsonl(source, start, end, first_line)


def sample_rows(source: Source, count: int = 200) -> list[Any]:
    """The first readable values, at most `count`."""
    found: list[Any] = []
    for item in read_rows(source):
        if isinstance(item, Row):
            found.append(item.value)
        if len(found) >= count or item.line > 50 * count:
            break
    return found


def _read_jsonl(source: Source, start: int, end: int | None, first_line: int) -> Iterator[Item]:
    if source.encoding.startswith("utf-16"):
        for line, problem, text in _utf16_lines(source):
            yield Broken(line, *problem) if text is None else _parse_line(line, text.strip().lstrip("\ufeff"), None)
        return
    for line, offset, raw in _lines(source, start, end, first_line):
        if isinstance(raw, str):
            yield Broken(line, raw, {"limit_mib": MAX_LINE_BYTES // 2**20})
            continue
        try:
            text = raw.decode(source.encoding).strip()
        except UnicodeDecodeError as error:
            yield Broken(line, "not_utf8", {"offset": offset + error.start})
        else:
            yield _parse_line(line, text, raw)


def _parse_line(line: int, text: str, raw: bytes | None) -> Item:
    if not text:
        return Broken(line, "blank_line", {})
    try:
        value, stop = _decode(text)
    except json.JSONDecodeError as error:
        return Broken(line, "broken_json", {"column": error.colno, "reason": error.msg})
    except RecursionError:
        return Broken(line, "too_deep", {})
    except ValueError as error:
        return Broken(line, "broken_json", {"column": 1, "reason": str(error)[:120]})
    if stop == len(text):
        return Row(line, value, raw)
    return Broken(line, "broken_json", {"column": stop + 1, "reason": "Extra data"})


def _lines(source: Source, start: int, end: int | None, first_line: int) -> Iterator[tuple[int, int, bytes | str]]:
    """(line number, byte offset, bytes) of each line; the code of a finding in place of the bytes if it is too long to hold."""
    with source.path.open("rb") as stream:
        offset, line = start, first_line
        stream.seek(start)
        while end is None or offset < end:
            raw = stream.readline(MAX_LINE_BYTES)
            if not raw:
                return
            length = len(raw)
            if length == MAX_LINE_BYTES and raw[-1] != 10:
                length += _skip_line(stream)
                yield line, offset, "too_long"
            elif offset == 0 and raw.startswith(codecs.BOM_UTF8):
                yield line, offset + 3, raw[3:]
            else:
                yield line, offset, raw
            offset += length
            line += 1


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        skipped += len(raw)
        if raw[-1] == 10:
            break
    return skipped


def _read_text(source: Source) -> Iterator[Item]:
    for line, problem, text in _decoded_lines(source):
        if text is None:
            yield Broken(line, *problem)
        elif text.strip():
            yield Row(line, {"text": text.strip()})


def _read_csv(source: Source) -> Iterator[Item]:
    csv.field_size_limit(MAX_LINE_BYTES)
    broken: list[Broken] = []

    def texts() -> Iterator[str]:
        for line, problem, text in _decoded_lines(source):
            if text is None:
                broken.append(Broken(line, *problem))
            else:
                yield text.replace("\x00", "")

    reader = csv.reader(texts(), delimiter=source.delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + len(broken) + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield Broken(line, "broken_csv", {"reason": str(error)})
            continue
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) != len(header):
                yield Broken(
                    line, "repeated_column", {"names": ", ".join(sorted({n for n in header if header.count(n) > 1}))}
                )
        elif len(cells) == len(header):
            yield Row(line, dict(zip(header, cells, strict=True)))
        elif cells:
            yield Broken(line, "cell_count", {"found": len(cells), "expected": len(header)})
    yield from broken


def _decoded_lines(source: Source) -> Iterator[tuple[int, Any, str | None]]:
    """(line, None, text), or (line, (code, params), None) for a line that cannot be decoded."""
    if source.encoding.startswith("utf-16"):
        yield from _utf16_lines(source)
        return
    for line, offset, raw in _lines(source, 0, None, 1):
        if isinstance(raw, str):
            yield line, (raw, {"limit_mib": MAX_LINE_BYTES // 2**20}), None
            continue
        try:
            yield line, None, raw.decode(source.encoding)
        except UnicodeDecodeError as error:
            yield line, ("not_utf8", {"offset": offset + error.start}), None


def _utf16_lines(source: Source) -> Iterator[tuple[int, Any, str | None]]:
    line = 0
    with source.path.open(encoding=source.encoding, newline="") as stream:
        try:
            while text := stream.readline(MAX_LINE_BYTES):
                line += 1
                yield line, None, text
        except UnicodeError as error:
            yield line + 1, ("not_utf8", {"offset": getattr(error, "start", 0)}), None


def _read_parquet(path: Path) -> Iterator[Item]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
            if any(size > MAX_GROUP_BYTES for size in sizes):
                yield Broken(1, "group_too_large", {"limit_gib": MAX_GROUP_BYTES // 2**30})
                return
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Broken(number + 1, "broken_parquet", {"reason": str(error).splitlines()[0][:200]})


def _guess_encoding(head: bytes) -> tuple[str, bool]:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16", True
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8", True
    if head[:200].count(0) > len(head[:200]) // 3:
        return ("utf-16-le" if head[1:2] == b"\x00" else "utf-16-be"), False
    for encoding in ("utf-8", "gb18030"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        return encoding, False
    return "utf-8", False


def _guess_layout(suffix: str, text: str) -> tuple[Layout, str]:
    if suffix in (".csv", ".tsv"):
        header = text.splitlines()[0] if text.strip() else ""
        return Layout.CSV, max(",\t;", key=header.count)
    if suffix in (".txt", ".md"):
        return Layout.TEXT, ","
    body = text.lstrip()
    if body.startswith("["):
        return Layout.ARRAY, ","
    first, newline, rest = body.partition("\n")
    if not body.startswith("{") or suffix == ".jsonl" or not rest.strip():
        return (Layout.OBJECTS if suffix == ".json" and body.startswith("{") else Layout.JSONL), ","
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return (Layout.OBJECTS if newline and not _looks_whole(first) else Layout.JSONL), ","
    return Layout.JSONL, ","


def _looks_whole(line: str) -> bool:
    """True for a line that ends like a row: a broken row of JSONL, not the first line of a spread-out object."""
    return line.rstrip().endswith("}")
