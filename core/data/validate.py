"""Checks a whole data file, line by line, in bounded memory. Large JSONL files are checked in parts, by several processes.

Knows what `core.data.rows` says of one row and what only the whole file shows: duplicates, mixed `loss` keys, no rows at all.
"""

import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from xxhash import xxh3_64_intdigest

from core.data.findings import Findings, Report
from core.data.formats import Columns, Detection, Format, detect
from core.data.reader import Broken, Layout, Row, Source, read_rows, sample_rows, sniff
from core.data.rows import is_plainly_good, parse_row
from core.messages import message
from core.runs.job import Progress, SilentProgress

PART_BYTES: Final = 16 * 2**20
_PARALLEL_FROM_BYTES: Final = 32 * 2**20
_EXCERPT: Final = 120
_REPORT_EVERY_ROWS: Final = 2000


@dataclass(slots=True)
class _Part:
    """What one part of the file showed; lines are counted from 1 within it."""

    findings: Findings = field(default_factory=Findings)
    lines: int = 0
    rows: int = 0
    good_rows: int = 0
    hashes: list[int] = field(default_factory=list)
    hash_lines: list[int] = field(default_factory=list)
    with_loss: int = 0
    without_loss: int = 0


def validate(
    path: Path,
    *,
    detection: Detection | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Report:
    """Check every row of `path`. `detection`: shape and columns chosen by hand. Never raises for what the file holds;

    raises InputError if it is missing or an archive, JobError `runs.cancelled` through `progress`.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    source = sniff(path)
    detected = detection or detect(sample_rows(source))
    total = _Part()
    with ThreadPoolExecutor(1) as pool:  # Hashing leaves the interpreter alone, so it goes on beside the check.
        sha256 = pool.submit(file_sha256, path)
        if source.size_bytes > 0 and detected.format is not Format.UNKNOWN:
            total = _check(source, detected, progress, workers or os.cpu_count() or 1)
        elif source.size_bytes > 0:
            total = _check_part(source, detected, 0, None, progress)
    _add_file_findings(source, detected, total)
    return Report(
        detection=detected,
        rows=total.rows,
        good_rows=max(0, total.good_rows),
        findings=total.findings.ordered(),
        size_bytes=source.size_bytes,
        sha256=sha256.result(),
        seconds=round(time.monotonic() - started, 3),
    )


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(source: Source, detection: Detection, progress: Progress, workers: int) -> _Part:
    is_splittable = (
        source.layout is Layout.JSONL and source.encoding == "utf-8" and source.size_bytes >= _PARALLEL_FROM_BYTES
    )
    if not is_splittable or workers < 2:
        part = _check_part(source, detection, 0, None, progress)
        _add_duplicates(part, [(part, 0)])
        return part
    total, parts, done_bytes, line_offset = _Part(), [], 0, 0
    bounds = list(split_at_lines(source.path, PART_BYTES))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for (start, end), part in zip(
                bounds, pool.map(_check_range, [(source, detection, *one) for one in bounds]), strict=True
            ):
                total.findings.merge(part.findings, line_offset)
                for name in ("rows", "good_rows", "with_loss", "without_loss"):
                    setattr(total, name, getattr(total, name) + getattr(part, name))
                parts.append((part, line_offset))
                line_offset += part.lines
                done_bytes += end - start
                progress.update(done_bytes, source.size_bytes, message("data.progress.check"), unit="bytes")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _add_duplicates(total, parts)
    return total


def split_at_lines(path: Path, part_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges of about `part_bytes` that end where lines end."""
    size = path.stat().st_size
    start = 0
    with path.open("rb") as stream:
        while start < size:
            stream.seek(min(start + part_bytes, size))
            while (block := stream.readline(2**20)) and not block.endswith(b"\n"):
                pass
            end = min(stream.tell(), size)
            yield start, end
            start = end


def _check_range(arguments: tuple[Source, Detection, int, int]) -> _Part:
    source, detection, start, end = arguments
    part = _check_part(source, detection, start, end, SilentProgress())
    part.hashes = np.array(part.hashes, dtype=np.uint64)  # type: ignore[assignment]
    part.hash_lines = np.array(part.hash_lines, dtype=np.int32)  # type: ignore[assignment]
    return part


def _check_part(source: Source, detection: Detection, start: int, end: int | None, progress: Progress) -> _Part:
    part = _Part()
    is_messages = detection.format is Format.MESSAGES and detection.columns == Columns(turns="messages")
    for item in read_rows(source, start, end):
        part.lines = max(part.lines, item.line)
        if isinstance(item, Broken):
            part.findings.add(item.code, item.line, item.params)
            continue
        part.rows += 1
        raw = item.raw
        if raw is not None:
            part.hashes.append(xxh3_64_intdigest(raw.strip()))
        else:
            part.hashes.append(_value_hash(item.value))
        part.hash_lines.append(item.line)
        if is_messages and raw is not None and is_plainly_good(item.value) and _is_plain_line(raw, item.value):
            part.good_rows += 1
            part.without_loss += 1
        elif detection.format is Format.UNKNOWN:
            if not isinstance(item.value, dict):
                part.findings.add("not_an_object", item.line, {}, _excerpt(item.value))
        else:
            _check_row(item, detection, source.encoding, part)
        if part.rows % _REPORT_EVERY_ROWS == 0:
            progress.update(part.rows, None, message("data.progress.check"), unit="rows")
    return part


def _is_plain_line(raw: bytes, row: dict[str, Any]) -> bool:
    """True if the line of a plainly good row holds no escaped character (perhaps NUL or half a pair) and no key twice."""
    if b"\\" in raw and b"\\u" in raw:  # One byte is looked for much faster than two.
        return False
    turns = len(row["messages"])
    if raw.count(b'"role"') != turns or raw.count(b'"content"') != turns:
        return False
    return all(
        raw.count(b'"' + key.encode("utf-8", "replace") + b'"') == 1
        and (key == "messages" or not isinstance(value, dict | list))
        for key, value in row.items()
    )


def _check_row(item: Row, detection: Detection, encoding: str, part: _Part) -> None:
    parsed = parse_row(item.value, detection.format, detection.columns)
    if item.raw is not None and (repeated := _repeated_key(item, encoding)):
        parsed.problems.append(("repeated_key", {"key": repeated}))
    for code, params in dict(reversed(parsed.problems)).items():
        part.findings.add(code, item.line, params, _excerpt(item.value))
    part.good_rows += not parsed.has_error
    if "loss_not_bool" not in {code for code, _ in parsed.problems}:
        answered = [message for message in parsed.messages if message["role"] == "assistant"]
        marked = sum("loss" in message for message in answered)
        part.with_loss += bool(marked)
        part.without_loss += marked < len(answered)


def _repeated_key(item: Row, encoding: str) -> str | None:
    """A key that an object of the line has twice: JSON readers keep the last, pyarrow (and so training) refuses the file."""
    if item.raw is None or not isinstance(item.value, dict) or not _may_repeat(item.raw, item.value, encoding):
        return None
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        found.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    json.loads(item.raw.decode(encoding).strip(), object_pairs_hook=look)
    return found[0] if found else None


def _may_repeat(raw: bytes, row: dict[str, Any], encoding: str) -> bool:
    """False only if no key stands in the line more often than in what was read of it."""
    expected: Counter[str] = Counter()
    waiting: list[Any] = [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            expected.update(value.keys())
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    is_plain = b"\\u" not in raw and not any('"' in key or "\\" in key or not key.isprintable() for key in expected)
    return not is_plain or any(
        raw.count(b'"' + key.encode(encoding, "replace") + b'"') > count for key, count in expected.items()
    )


def _add_duplicates(total: _Part, parts: list[tuple[_Part, int]]) -> None:
    if not any(len(part.hashes) for part, _ in parts):
        return
    hashes = np.concatenate([np.asarray(part.hashes, dtype=np.uint64) for part, _ in parts])
    lines = np.concatenate([np.asarray(part.hash_lines, dtype=np.int64) + offset for part, offset in parts])
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    for at in np.flatnonzero(first[inverse] != np.arange(len(hashes))):
        total.findings.add("duplicate_row", int(lines[at]), {"first": int(lines[first[inverse[at]]])})


def _add_file_findings(source: Source, detection: Detection, total: _Part) -> None:
    findings = total.findings
    if source.size_bytes == 0:
        findings.add("empty_file", 1)
        return
    if source.has_bom and source.encoding == "utf-8":
        findings.add("bom", 1)
    if source.encoding != "utf-8" and source.layout is not Layout.PARQUET:
        findings.add("encoding", 1, {"encoding": source.encoding.upper()})
    if total.rows == 0:
        findings.add("no_rows", 1)
    elif detection.format is Format.UNKNOWN:
        total.good_rows = 0
        findings.add("unknown_format", 1, {"names": ", ".join(detection.names[:8]) or "—"})
    elif not detection.is_sure:
        findings.add("unsure_format", 1, {"percent": round(100 * detection.confidence)})
    if total.with_loss and total.without_loss:
        findings.add("mixed_loss", 1, {"with_loss": total.with_loss, "without_loss": total.without_loss})


def _value_hash(value: Any) -> int:
    try:
        text = json.dumps(value, ensure_ascii=True, sort_keys=True, default=str)
    except (ValueError, TypeError, RecursionError):
        text = repr(type(value))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _excerpt(value: Any) -> str:
    """The beginning of a row, safe to show and to store."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return ""
    return text[:_EXCERPT].encode("utf-8", "replace").decode("utf-8")
