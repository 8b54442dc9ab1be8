"""Several data sets into one: joined whole, or general rows mixed in against forgetting. Writes a new file, touches none it reads."""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from core.data.convert import says_loss, with_all_loss_keys, write_manifest, write_rows
from core.data.formats import Detection, Format, detect
from core.data.reader import Row, read_rows, sample_rows, sniff
from core.data.rows import parse_row
from core.data.validate import file_sha256
from core.errors import InputError
from core.files import within
from core.messages import message
from core.project import Project, open_project
from core.runs.job import Progress, SilentProgress

MOST_PERCENT: Final = 90
_REPORT_EVERY_ROWS: Final = 2000


def join(project: Project, paths: Sequence[Path], name: str, progress: Progress | None = None) -> Path:
    """All good rows of `paths`, one file after the other, as `name`.jsonl in canonical form. Equal rows are kept once.

    Raises InputError `data.other_kinds` if some hold chats and some plain text, `data.unknown_format`, `data.nothing_left`.
    """
    read = _Reader(paths)
    rows = (row for path in paths for row in read(path))
    return _write(project, rows, paths, {"name": name, "made_by": "join"}, progress)


def mix(
    project: Project, path: Path, general: Path, percent: int, *, seed: int = 0, progress: Progress | None = None
) -> Path:
    """All good rows of `path`, and among them so many of `general`, chosen at random, that they make up `percent` of the result.

    They are spread over the whole file. A `general` with too few rows gives all it has. Raises as `join`, and `data.bad_mix`.
    """
    if not 1 <= percent <= MOST_PERCENT:
        raise InputError("data.bad_mix", percent=percent, most=MOST_PERCENT)
    read = _Reader([path, general])
    own = sum(1 for _ in read(path))
    chooser = random.Random(seed)  # noqa: S311 - variety, not secrecy
    chosen = _sample(read(general), max(1, round(own * percent / (100 - percent))), chooser)
    rows = _spread(read(path), own, chosen, chooser)
    made = {"name": f"{path.stem}_mixed", "made_by": "mix", "percent": percent, "seed": seed}
    return _write(project, rows, [path, general], made, progress)


def append(
    project: Project,
    path: Path | None,
    added: Sequence[dict[str, Any]],
    name: str,
    *,
    source: str,
    progress: Progress | None = None,
) -> tuple[Path, int]:
    """All good rows of `path` (None: of nothing), then those of `added` (canonical form) that it does not hold, as `name`.jsonl.

    `source`: where `added` come from, for the manifest. Returns the new file and how many rows were added. Raises InputError
    `data.bad_name`, `data.nothing_new` if `path` holds them all, and as `join`.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError("data.bad_name", name=name[:100], known=".jsonl")
    paths = [path] if path else []
    read = _Reader(paths)
    if path and detect(sample_rows(sniff(path))).format is Format.TEXT:
        raise InputError("data.other_kinds", texts=path.name)
    rows = [with_all_loss_keys(row) for row in added] if read.marks_loss else list(added)
    held = {_digest(row) for each in paths for row in read(each)}
    fresh = list({_digest(row): row for row in rows if _digest(row) not in held}.values())
    if not fresh:
        raise InputError("data.nothing_new", path=path.name if path else name)
    every = itertools.chain((row for each in paths for row in read(each)), fresh)
    made = {"name": name, "made_by": "chat", "added": len(fresh), "source": source}
    return _write(project, every, paths, made, progress), len(fresh)


def append_job(
    *, project: str, path: str, added: list[dict[str, Any]], name: str, source: str, progress: Progress
) -> dict[str, Any]:
    """`append` to a large file as a supervised job."""
    made, count = append(open_project(Path(project)), Path(path), added, name, source=source, progress=progress)
    return {"path": str(made), "added": count}


def mix_job(*, project: str, path: str, general: str, percent: int, progress: Progress) -> dict[str, Any]:
    """`mix` as a supervised job."""
    return {"path": str(mix(open_project(Path(project)), Path(path), Path(general), percent, progress=progress))}


def join_job(*, project: str, paths: list[str], name: str, progress: Progress) -> dict[str, Any]:
    """`join` as a supervised job."""
    return {"path": str(join(open_project(Path(project)), [Path(path) for path in paths], name, progress))}


def _write(
    project: Project,
    rows: Iterator[dict[str, Any]],
    paths: Sequence[Path],
    made: dict[str, Any],
    progress: Progress | None,
) -> Path:
    counts = {"rows_in": 0, "rows_out": 0}
    unique = _unique(rows, counts, progress or SilentProgress())
    target = write_rows(within(project.data / f"{made.pop('name')}.jsonl", project.data), unique)
    if not counts["rows_out"]:
        target.unlink()
        raise InputError("data.nothing_left", path=str(paths[0]), rows=counts["rows_in"])
    sources = [{"path": str(path), "sha256": file_sha256(path)} for path in paths]
    names = ", ".join(path.name for path in paths)
    write_manifest(project, target, {"source": names, "sources": sources, **counts, **made})
    return target


def _unique(rows: Iterator[dict[str, Any]], counts: dict[str, int], progress: Progress) -> Iterator[dict[str, Any]]:
    """Rows without repetition, counted on their way in and out."""
    seen: set[bytes] = set()
    for row in rows:
        counts["rows_in"] += 1
        digest = _digest(row)
        if digest not in seen:
            seen.add(digest)
            counts["rows_out"] += 1
            yield row
        if counts["rows_in"] % _REPORT_EVERY_ROWS == 0:
            progress.update(counts["rows_in"], None, message("data.progress.mix"), unit="rows")


def _digest(row: dict[str, Any]) -> bytes:
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).digest()


def _sample(rows: Iterator[dict[str, Any]], count: int, chooser: random.Random) -> list[dict[str, Any]]:
    """`count` rows of a stream, each with the same chance (reservoir sampling, Vitter 1985, algorithm R)."""
    kept: list[dict[str, Any]] = []
    for seen, row in enumerate(rows):
        if seen < count:
            kept.append(row)
        elif (place := chooser.randrange(seen + 1)) < count:
            kept[place] = row
    chooser.shuffle(kept)
    return kept


def _spread(
    rows: Iterator[dict[str, Any]], count: int, others: list[dict[str, Any]], chooser: random.Random
) -> Iterator[dict[str, Any]]:
    """`count` rows in their order, and `others` at random places among them."""
    total = count + len(others)
    places = set(chooser.sample(range(total), len(others)))
    more = iter(others)
    for at in range(total):
        row = next(more if at in places else rows, None)
        if row is not None:  # A file that shrinks meanwhile gives fewer.
            yield row


class _Reader:
    """Rows of any of `paths` that training can use, in canonical form, with loss marks in all of them or in none."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._detections = {path: _detection(path) for path in paths}
        texts = [path.name for path, found in self._detections.items() if found.format is Format.TEXT]
        if texts and len(texts) < len(self._detections):
            raise InputError("data.other_kinds", texts=", ".join(texts))
        self.marks_loss = any(says_loss(sniff(path)) for path in paths)

    def __call__(self, path: Path) -> Iterator[dict[str, Any]]:
        detection = self._detections[path]
        for item in read_rows(sniff(path)):
            if not isinstance(item, Row):
                continue
            parsed = parse_row(item.value, detection.format, detection.columns)
            if parsed.dropped_for is None:
                row = parsed.to_row()
                yield with_all_loss_keys(row) if self.marks_loss else row


def _detection(path: Path) -> Detection:
    found = detect(sample_rows(sniff(path)))
    if found.format is Format.UNKNOWN:
        raise InputError("data.unknown_format", path=str(path), names=", ".join(found.names[:8]) or "—")
    return found
