"""Writes a data set anew in canonical form: JSON Lines, UTF-8, `{"messages": […]}` or `{"text": …}`. Never touches the original.

In the project's private folder lie a manifest (where the rows came from, how many went in and out) and the list of rows left out.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from core.data.findings import CODES, Remedy, Severity
from core.data.formats import Detection, Format, detect
from core.data.reader import Broken, Layout, Source, read_rows, sample_rows, sniff
from core.data.rows import Parsed, parse_row
from core.data.validate import file_sha256
from core.errors import InputError, MachineError
from core.files import free_path, require_space, within, write_json
from core.messages import message
from core.project import Project, open_project
from core.runs.job import Progress, SilentProgress
from core.runs.launch import now_utc

_REPORT_EVERY_ROWS: Final = 500


@dataclass(frozen=True, slots=True)
class Converted:
    """What conversion made."""

    path: Path
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    """Rows left out, by the code of the finding."""
    fixed: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": self.dropped,
            "fixed": self.fixed,
        }


def manifest_path(project: Project, data_path: Path) -> Path:
    """Where the manifest of a data set that the app made lies."""
    return project.private / "data" / f"{data_path.name}.manifest.json"


def dropped_path(project: Project, data_path: Path) -> Path:
    """JSON Lines: `{"line", "code", "params"}` of each row left out."""
    return project.private / "data" / f"{data_path.name}.dropped.jsonl"


def convert(
    project: Project,
    source_path: Path,
    *,
    name: str | None = None,
    detection: Detection | None = None,
    keep: Collection[str] = (),
    progress: Progress | None = None,
) -> Converted:
    """Convert `source_path` into a new file of `project.data` and return what became of the rows.

    `keep`: codes of warnings whose rows are to stay in although conversion would leave them out (`duplicate_row`).
    Raises InputError `data.unknown_format`, `data.nothing_left`, `files.*`; MachineError without space.
    """
    progress = progress or SilentProgress()
    source = sniff(source_path)
    detection = detection or detect(sample_rows(source))
    if detection.format is Format.UNKNOWN:
        raise InputError("data.unknown_format", path=str(source_path), names=", ".join(detection.names[:8]) or "—")
    require_space(project.data, 2 * source.size_bytes)
    kept = {code for code in keep if CODES[code][0] is not Severity.ERROR}
    walker = _Walker(detection, kept, progress, writes_loss=says_loss(source))
    stem = Path(name).stem if name else source_path.stem
    target = within(project.data / f"{stem}.jsonl", project.data)
    (project.private / "data").mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=project.private / "data", prefix=".dropped."
    ) as dropped:
        walker.on_drop = lambda line, code, params: _write_line(dropped, {"line": line, "code": code, "params": params})
        path = write_rows(target, walker.walk(read_rows(source)))
        if walker.rows_out == 0:
            path.unlink()
            raise InputError("data.nothing_left", path=str(source_path), rows=walker.rows_in)
        if walker.dropped:
            dropped.flush()
            shutil.copyfile(dropped.name, dropped_path(project, path))
    result = Converted(path, walker.rows_in, walker.rows_out, dict(walker.dropped), dict(walker.fixed))
    write_manifest(
        project, path, {"made_by": "convert", "source": str(source_path), "source_sha256": file_sha256(source_path),
                        "detection": detection.to_json(), **result.to_json()},
    )  # fmt: skip
    return result


def convert_job(
    project: str, source: str, *, progress: Progress, name: str | None = None, detection: dict[str, Any] | None = None,
    keep: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """`convert` as a supervised job."""
    chosen = Detection.from_json(detection) if detection else None
    opened = open_project(Path(project))
    return convert(opened, Path(source), name=name, detection=chosen, keep=keep, progress=progress).to_json()


def write_rows(target: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """Write `rows` as JSON Lines to `target` or the next free name; a reader sees all of them or no file. Returns the path.

    Raises MachineError `files.cannot_write`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        return place(Path(temporary), target)
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(target), reason=error.strerror or str(error)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def place(temporary: Path, target: Path) -> Path:
    """Give the finished file `temporary` the name `target`, or the next free one, without ever replacing a file."""
    while True:
        path = free_path(target)
        with suppress(FileExistsError):
            os.link(temporary, path)
            return path


def write_manifest(project: Project, data_path: Path, value: dict[str, Any]) -> None:
    """Say where `data_path` came from; its own hash names this version."""
    write_json(
        manifest_path(project, data_path),
        {"schema_version": 1, "created_at": now_utc(), "sha256": file_sha256(data_path), **value},
    )


class _Walker:
    """Parses rows one by one and decides which go out."""

    def __init__(self, detection: Detection, keep: set[str], progress: Progress, *, writes_loss: bool) -> None:
        self._writes_loss = writes_loss
        self._detection = detection
        self._keep = keep
        self._progress = progress
        self._seen: set[bytes] = set()
        self.rows_in = 0
        self.rows_out = 0
        self.dropped: Counter[str] = Counter()
        self.fixed: Counter[str] = Counter()
        self.on_drop: Callable[[int, str, dict[str, Any]], None] = lambda line, code, params: None  # noqa: ARG005

    def walk(self, items: Iterator[Any]) -> Iterator[dict[str, Any]]:
        for item in items:
            if isinstance(item, Broken):
                if CODES[item.code][1] is Remedy.FIX:
                    self.fixed[item.code] += 1
                else:
                    self.rows_in += 1
                    self._drop(item.line, item.code, item.params)
                continue
            self.rows_in += 1
            if self.rows_in % _REPORT_EVERY_ROWS == 0:
                self._progress.update(self.rows_in, None, message("data.progress.convert"), unit="rows")
            row = self._decide(item.line, parse_row(item.value, self._detection.format, self._detection.columns))
            if row is not None:
                self.rows_out += 1
                yield row

    def _decide(self, line: int, parsed: Parsed) -> dict[str, Any] | None:
        if (problem := parsed.dropped_for) is not None:
            self._drop(line, *problem)
            return None
        row = parsed.to_row()
        digest = hashlib.blake2b(json.dumps(row).encode(), digest_size=12).digest()
        if digest in self._seen and "duplicate_row" not in self._keep:
            self._drop(line, "duplicate_row", {})
            return None
        self._seen.add(digest)
        self.fixed.update({code for code, _ in parsed.problems if CODES[code][1] is Remedy.FIX})
        return with_all_loss_keys(row) if self._writes_loss else row

    def _drop(self, line: int, code: str, params: dict[str, Any]) -> None:
        self.dropped[code] += 1
        self.on_drop(line, code, params)


def with_all_loss_keys(row: dict[str, Any]) -> dict[str, Any]:
    """Where one message of a file says `loss`, every one has to: readers of JSON fill gaps with null, which XTuner takes for false."""
    if "messages" not in row:
        return row
    return {
        "messages": [{**one, "loss": one["role"] == "assistant" and one.get("loss", True)} for one in row["messages"]]
    }


def _write_line(stream: IO[str], value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")


def says_loss(source: Source) -> bool:
    """True if the word stands anywhere in the file."""
    if source.layout is Layout.PARQUET:
        return any("loss" in json.dumps(row, default=str) for row in sample_rows(source))
    tail = b""
    with source.path.open("rb") as stream:
        while block := stream.read(2**20):
            if b"loss" in tail + block:
                return True
            tail = block[-4:]
    return False
