"""The data sets of a project: what lies in `data/`, what is known of each file, and rows for browsing.

What validation found is kept in the project's private folder and counts as long as the file is unchanged.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from core.data.convert import manifest_path
from core.data.findings import Report
from core.data.formats import Detection, Format, dataset_map_fn_for, detect, has_template, is_native
from core.data.generate import write_new
from core.data.reader import Layout, Row, read_rows, sample_rows, sniff
from core.data.validate import validate
from core.errors import DanluError, InputError, MachineError
from core.files import free_path, read_json, require_space, within, write_json
from core.i18n import Catalog
from core.messages import Message, message
from core.project import Project, open_project
from core.runs.job import Progress

SUFFIXES: Final = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
INLINE_BYTES: Final = 8 * 2**20
"""Files up to this size are checked at once; larger ones in a job."""
_COPY_BYTES: Final = 8 * 2**20
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Dataset:
    """One data file of a project."""

    path: Path
    layout: Layout | None
    """None: the file cannot be read as data at all (an archive)."""
    detection: Detection
    size_bytes: int
    modified_ns: int
    report: Report | None
    """What validation found, if the file is unchanged since."""
    problem: DanluError | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def format(self) -> Format:
        return self.detection.format

    @property
    def rows(self) -> int | None:
        return self.report.rows if self.report else None

    @property
    def sha256(self) -> str | None:
        return self.report.sha256 if self.report else None

    @property
    def map_fn(self) -> str | None:
        """Name of the XTuner map function for `dataset_map_fn`; None for XTuner's own `conversation` rows."""
        return dataset_map_fn_for(self.format)

    @property
    def has_template(self) -> bool:
        """Whether `template_map_fn` applies."""
        return has_template(self.format)

    @property
    def is_trainable(self) -> bool:
        """True if XTuner reads the file as it is: a known shape in JSON or JSONL, and no error found (or not yet looked for)."""
        is_json = self.layout in (Layout.JSONL, Layout.ARRAY)
        return (
            is_json
            and is_native(self.format)
            and self.detection.is_canonical
            and not (self.report and self.report.errors)
        )


def list_datasets(project: Project) -> list[Dataset]:
    """Every data file of the project, by name. Never raises for what a file holds."""
    files = [
        file for file in project.data.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    return [describe(project, file) for file in sorted(files) if file.is_file() and _is_inside(file, project.data)]


def describe(project: Project, path: Path) -> Dataset:
    """What is known of `path`: from the last report if the file is unchanged, else from a look at its first rows."""
    status = path.stat()
    stored = _stored(project, path)
    if stored is not None:
        return Dataset(
            path,
            stored["layout"],
            stored["report"].detection,
            status.st_size,
            status.st_mtime_ns,
            stored["report"],
        )
    try:
        source = sniff(path)
        detection = detect(sample_rows(source, 50)) if status.st_size else Detection(Format.UNKNOWN, 0.0)
    except DanluError as error:
        return Dataset(path, None, Detection(Format.UNKNOWN, 0.0), status.st_size, status.st_mtime_ns, None, error)
    return Dataset(path, source.layout, detection, status.st_size, status.st_mtime_ns, None)


def check(
    project: Project, path: Path, detection: Detection | None = None, progress: Progress | None = None
) -> Dataset:
    """Validate the whole file and keep the report. Raises what `validate` raises."""
    report = validate(path, detection=detection, progress=progress)
    status = path.stat()
    write_json(
        _report_path(project, path),
        {
            "layout": str(sniff(path).layout),
            "size_bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "report": report.to_json(),
        },
    )
    return describe(project, path)


def check_job(project: str, path: str, progress: Progress, detection: dict[str, Any] | None = None) -> dict[str, Any]:
    """`check` as a supervised job; the report is on the disk afterwards."""
    chosen = Detection.from_json(detection) if detection else None
    checked = check(open_project(Path(project)), Path(path), chosen, progress)
    return {"rows": checked.rows, "errors": checked.report.errors if checked.report else 0}


def manifest(project: Project, path: Path) -> dict[str, Any] | None:
    """Where a data set that the app made came from; None for another one, or if that cannot be read."""
    try:
        value = read_json(manifest_path(project, path))
    except DanluError:
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of a file."""

    rows: list[Row]
    has_more: bool


def browse(path: Path, *, offset: int = 0, count: int = 20, query: str = "") -> Page:
    """`count` rows from the `offset`-th on, of those that contain `query`, in any letter case. Late pages of large files take longer."""
    found: list[Row] = []
    for number, row in enumerate(_matching(path, query.strip().casefold())):
        if number >= offset + count:
            return Page(found, True)
        if number >= offset:
            found.append(Row(row.line, row.value))
    return Page(found, False)


def add_file(project: Project, name: str, stream: BinaryIO, size_bytes: int) -> Path:
    """Put an uploaded file into `project.data` under its own name, or the next free one. Raises InputError `data.bad_name`."""
    target = _target(project, name)
    require_space(project.data, size_bytes)
    return write_new(target, stream.read())


def readable_source(text: str) -> Path:
    """The file of this machine that `text` names, if data can be read from it. Raises InputError `files.missing`, `data.*`."""
    path = Path(text).expanduser().absolute()
    if path.suffix.lower() not in SUFFIXES:
        raise InputError("data.bad_name", name=path.name[:100], known=", ".join(SUFFIXES))
    return sniff(path).path


def copy_file(project: str, source: str, progress: Progress) -> dict[str, Any]:
    """Job: copy a file of this machine into the project's data folder, whole or not at all. Raises InputError, MachineError."""
    origin, opened = Path(source).expanduser(), open_project(Path(project))
    if not origin.is_file():
        raise InputError("files.missing", path=str(origin))
    target = _target(opened, origin.name)
    size = origin.stat().st_size
    require_space(opened.data, size)
    temporary = free_path(opened.data / f".{origin.name}.part")
    try:
        with origin.open("rb") as reader, temporary.open("xb") as writer:
            while block := reader.read(_COPY_BYTES):
                writer.write(block)
                progress.update(writer.tell(), size, message("data.progress.copy"), unit="bytes")
        path = free_path(target)
        path.hardlink_to(temporary)
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(target), reason=error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return {"path": str(path)}


def findings_csv(report: Report, words: Catalog) -> str:
    """The places of all findings as CSV for a spreadsheet: code, severity, line, what. Cells that look like formulas become text."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["code", "severity", "line", "what", "row"])
    for finding in report.findings:
        known = {example.line: example for example in finding.examples}
        for line in finding.lines:
            example = known.get(line)
            said = words.say(
                Message(
                    f"data.found.{finding.code}",
                    {**(example.params if example else finding.message.params), "line": line},
                )
            )
            writer.writerow(
                [
                    plain_cell(cell)
                    for cell in (
                        finding.code,
                        str(finding.severity),
                        str(line),
                        said,
                        example.excerpt if example else "",
                    )
                ]
            )
    return out.getvalue()


def plain_cell(text: str) -> str:
    """`text` so that a spreadsheet shows it and does not run it (CWE-1236)."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _matching(path: Path, query: str) -> Iterator[Row]:
    for item in read_rows(sniff(path)):
        if isinstance(item, Row) and (
            not query or query in json.dumps(item.value, ensure_ascii=False, default=str).casefold()
        ):
            yield item


def _target(project: Project, name: str) -> Path:
    plain = Path(name.replace("\\", "/")).name
    if (
        not plain
        or plain.startswith(".")
        or Path(plain).suffix.lower() not in SUFFIXES
        or any(ord(letter) < 32 for letter in plain)
    ):
        raise InputError("data.bad_name", name=name[:100], known=", ".join(SUFFIXES))
    return within(project.data / plain, project.data)


def _is_inside(path: Path, root: Path) -> bool:
    """A file may be a link (large sets are shared that way); a folder on the way to it may not lead out."""
    return path.parent.resolve().is_relative_to(root.resolve())


def _report_path(project: Project, path: Path) -> Path:
    key = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:20]
    return project.private / "data" / "reports" / f"{key}.json"


def _stored(project: Project, path: Path) -> dict[str, Any] | None:
    file = _report_path(project, path)
    if not file.is_file():
        return None
    status = path.stat()
    try:
        value = read_json(file)
        if (value["size_bytes"], value["modified_ns"]) != (status.st_size, status.st_mtime_ns):
            return None
        return {"layout": Layout(value["layout"]), "report": Report.from_json(value["report"])}
    except (DanluError, KeyError, TypeError, ValueError):
        return None
