"""New versions of a data set: a train and a validation part, and single rows edited. The file they come from is never touched."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.convert import write_manifest, write_rows
from core.data.formats import detect
from core.data.reader import Row, read_rows, sample_rows, sniff
from core.data.rows import parse_row
from core.data.validate import file_sha256
from core.errors import InputError
from core.files import within
from core.messages import Message
from core.project import Project


@dataclass(frozen=True, slots=True)
class Split:
    train: Path
    validation: Path
    train_rows: int
    validation_rows: int


def split_dataset(project: Project, path: Path, validation_percent: int, seed: int = 0) -> Split:
    """Two new files `<name>_train.jsonl` and `<name>_validation.jsonl`.

    The hash of a row with `seed` says where it goes: equal rows stay together.

    Raises InputError `data.bad_share`, `data.split_empty`.
    """
    if not 1 <= validation_percent <= 50:
        raise InputError("data.bad_share", percent=validation_percent)
    counts = {True: 0, False: 0}

    def part(is_validation: bool) -> Iterator[dict[str, Any]]:
        for item in read_rows(sniff(path)):
            if (
                isinstance(item, Row)
                and isinstance(item.value, dict)
                and _is_validation(item.value, validation_percent, seed) is is_validation
            ):
                counts[is_validation] += 1
                yield item.value

    train = write_rows(within(project.data / f"{path.stem}_train.jsonl", project.data), part(False))
    validation = write_rows(within(project.data / f"{path.stem}_validation.jsonl", project.data), part(True))
    if not counts[True] or not counts[False]:
        train.unlink()
        validation.unlink()
        raise InputError("data.split_empty", rows=counts[True] + counts[False], percent=validation_percent)
    for file, rows in ((train, counts[False]), (validation, counts[True])):
        write_manifest(
            project,
            file,
            {
                "made_by": "split",
                "source": str(path),
                "source_sha256": file_sha256(path),
                "percent": validation_percent,
                "seed": seed,
                "rows_out": rows,
            },
        )
    return Split(train, validation, counts[False], counts[True])


def replace_row(project: Project, path: Path, line: int, text: str) -> Path:
    """A new version `<name>_edited.jsonl` in which the row at `line` is the JSON `text`. Returns its path.

    Raises InputError `data.bad_edit` if `text` is no JSON or a row that training could not use, `data.no_such_row`.
    """
    detection = detect(sample_rows(sniff(path)))
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError("data.bad_edit", line=line, reason=str(error)[:160]) from error
    parsed = parse_row(value, detection.format, detection.columns)
    if parsed.dropped_for is not None:
        code, params = parsed.dropped_for
        raise InputError("data.bad_edit", line=line, reason=Message(f"data.found.{code}", params))
    was_found = False

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal was_found
        for item in read_rows(sniff(path)):
            if isinstance(item, Row):
                was_found = was_found or item.line == line
                yield value if item.line == line else item.value

    stem = path.stem.removesuffix("_edited")
    new = write_rows(within(project.data / f"{stem}_edited.jsonl", project.data), rows())
    if not was_found:
        new.unlink()
        raise InputError("data.no_such_row", path=str(path), line=line)
    write_manifest(
        project, new, {"made_by": "edit", "source": str(path), "source_sha256": file_sha256(path), "line": line}
    )
    return new


def _is_validation(row: dict[str, Any], percent: int, seed: int) -> bool:
    text = json.dumps(row, sort_keys=True, ensure_ascii=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest) % 10_000 < percent * 100
