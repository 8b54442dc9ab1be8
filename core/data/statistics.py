"""Token lengths of a whole data set with a model's tokenizer and a template, kept in the project, and what they mean for training."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from core.data.arithmetic import Packing, map_num_proc, pack, percentile, suggest_max_length
from core.data.formats import Detection, Format
from core.data.preview import measure_rows
from core.data.reader import Row, read_rows, sniff
from core.data.tokenizer import TextTokenizer, load_tokenizer, tokenizer_file
from core.errors import InputError
from core.messages import message
from core.project import Project
from core.runs.job import Progress, SilentProgress
from core.xtuner.templates import PromptTemplate

_BATCH_ROWS: Final = 512
_HISTOGRAM_BINS: Final = 40
_LENGTHS_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of every row, before cutting."""

    tokens: npt.NDArray[np.int32]
    first_learned: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    """Where each row stands in the file."""
    unusable_rows: int
    """Rows that could not be rendered."""

    def dropped_lines(self, max_length: int) -> list[int]:
        """Lines of the rows of which nothing learned is left within `max_length`: their prompt alone is as long."""
        is_kept = self.first_learned < np.minimum(self.tokens, max_length)
        return [int(line) for line in self.lines[~is_kept]]

    def summary(self, max_length: int, *, packs: bool = True, num_proc: int | None = None) -> "LengthSummary":
        """What training with this `max_length` makes of the rows."""
        is_kept = self.first_learned < np.minimum(self.tokens, max_length)
        kept = np.minimum(self.tokens[is_kept], max_length)
        ordered = np.sort(self.tokens).tolist()
        processes = num_proc or map_num_proc(len(self.tokens))
        total = int(kept.sum())
        return LengthSummary(
            rows=len(self.tokens),
            max_length=max_length,
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            longest=ordered[-1] if ordered else 0,
            total_tokens=int(self.tokens.sum()),
            truncated_rows=int((self.tokens > max_length).sum()),
            dropped_rows=int((~is_kept).sum()),
            suggested_max_length=suggest_max_length(ordered),
            packing=pack(kept.tolist(), max_length, processes) if packs else Packing(len(kept), total, 0),
            padding_share=0.0 if packs or not len(kept) else 1 - total / (len(kept) * int(kept.max())),
        )

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, rows) of bins of equal width over the lengths up to the 99.5th percentile; the last one holds all longer rows."""
        if not len(self.tokens):
            return []
        top = max(_HISTOGRAM_BINS, int(np.percentile(self.tokens, 99.5)) + 1)
        width = -(-top // _HISTOGRAM_BINS)
        counts = np.bincount(np.minimum(self.tokens // width, _HISTOGRAM_BINS - 1), minlength=_HISTOGRAM_BINS)
        return [(index * width, (index + 1) * width, int(count)) for index, count in enumerate(counts)]


@dataclass(frozen=True, slots=True)
class LengthSummary:
    rows: int
    max_length: int
    p50: int
    p90: int
    p99: int
    longest: int
    total_tokens: int
    truncated_rows: int
    """Longer than max_length: their end is cut off."""
    dropped_rows: int
    """Nothing learned is left within max_length: XTuner drops them without a word."""
    suggested_max_length: int
    packing: Packing
    padding_share: float
    """Upper bound of padding without packing, where every batch is as long as its longest row."""


def lengths_file(project: Project, data_path: Path, model_folder: Path, template: PromptTemplate | None) -> Path:
    """Where the lengths are kept. The name changes with data, tokenizer, template."""
    tokenizer = tokenizer_file(project, model_folder)
    known = [
        _LENGTHS_VERSION,
        _mark(data_path),
        str(model_folder),
        _mark(tokenizer) if tokenizer else "",
        template.to_json() if template else None,
    ]
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:20]
    return project.private / "data" / "lengths" / f"{key}.npz"


def load_lengths(
    project: Project, data_path: Path, model_folder: Path, template: PromptTemplate | None
) -> Lengths | None:
    """Lengths measured before, or None."""
    file = lengths_file(project, data_path, model_folder, template)
    if not file.is_file():
        return None
    with np.load(file) as stored:
        return Lengths(stored["tokens"], stored["first_learned"], stored["lines"], int(stored["unusable_rows"]))


def measure(
    project: Project,
    data_path: Path,
    detection: Detection,
    model_folder: Path,
    template: PromptTemplate | None,
    *,
    progress: Progress | None = None,
) -> Lengths:
    """Tokenise every row, exactly as training will, and keep the lengths. Raises InputError of the tokenizer, `data.unknown_format`."""
    progress = progress or SilentProgress()
    if detection.format is Format.UNKNOWN:
        raise InputError("data.unknown_format", path=str(data_path), names=", ".join(detection.names[:8]) or "—")
    tokenizer = load_tokenizer(project, model_folder)
    lengths = _measure(
        data_path, detection, tokenizer, template if detection.format is not Format.TEXT else None, progress
    )
    file = lengths_file(project, data_path, model_folder, template)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.new.npz")
    np.savez(
        temporary,
        tokens=lengths.tokens,
        first_learned=lengths.first_learned,
        lines=lengths.lines,
        unusable_rows=lengths.unusable_rows,
    )
    temporary.replace(file)
    return lengths


def measure_job(
    project: str,
    data_path: str,
    *,
    detection: Mapping[str, Any],
    model_folder: str,
    template: Mapping[str, Any] | None,
    progress: Progress,
) -> dict[str, Any]:
    """`measure` as a supervised job; the lengths are on the disk afterwards."""
    chosen = PromptTemplate.from_json(template) if template else None
    lengths = measure(
        Project(Path(project)),
        Path(data_path),
        Detection.from_json(detection),
        Path(model_folder),
        chosen,
        progress=progress,
    )
    return {"rows": len(lengths.tokens), "unusable_rows": lengths.unusable_rows}


def _measure(
    data_path: Path, detection: Detection, tokenizer: TextTokenizer, template: PromptTemplate | None, progress: Progress
) -> Lengths:
    tokens: list[npt.NDArray[np.int32]] = []
    firsts: list[npt.NDArray[np.int32]] = []
    lines: list[npt.NDArray[np.int32]] = []
    unusable = done = 0
    for batch in _batches(data_path):
        values = [row.value for row in batch]
        measured = measure_rows(values, detection.format, detection.columns, template, tokenizer)
        good = [length for length in measured if length is not None]
        unusable += len(measured) - len(good)
        tokens.append(np.array([length.tokens for length in good], dtype=np.int32))
        firsts.append(np.array([length.first_learned for length in good], dtype=np.int32))
        used = [row.line for row, length in zip(batch, measured, strict=True) if length is not None]
        lines.append(np.array(used, dtype=np.int32))
        done += len(batch)
        progress.update(done, None, message("data.progress.measure"), unit="rows")
    empty = np.zeros(0, dtype=np.int32)
    return Lengths(
        np.concatenate([empty, *tokens]), np.concatenate([empty, *firsts]), np.concatenate([empty, *lines]), unusable
    )


def _batches(data_path: Path) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for item in read_rows(sniff(data_path)):
        if isinstance(item, Row):
            batch.append(item)
        if len(batch) >= _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _mark(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
