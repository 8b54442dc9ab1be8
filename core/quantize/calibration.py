"""Rows of a data set as training sees them, token for token: what the quantiser measures the model on, and others to judge it by.

Chosen at random over the whole file; the same file and choice give the same rows.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.data.formats import Detection, has_template
from core.data.library import describe
from core.data.preview import training_segments
from core.data.reader import Row, read_rows, sniff
from core.data.tokenizer import TextTokenizer, export_tokenizer, load_tokenizer, tokenizer_file
from core.errors import InputError
from core.messages import message
from core.project import Project
from core.runs.job import Progress
from core.xtuner.templates import PromptTemplate, prompt_templates
from core.xtuner.tokens import guess_template

FEWEST_ROWS: Final = 16
FEWEST_TOKENS: Final = 1024
HELD_OUT: Final = 16
"""Rows kept back: the loss on them is compared before and after."""
_SHORTEST: Final = 8
"""Tokens a row must have."""
_SPARE: Final = 2
"""Rows drawn for each one wanted: some turn out unusable."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids of rows, each cut at the length asked for."""

    rows: list[list[int]]
    held_out: list[list[int]]
    """None of them is among `rows`."""
    template: str | None
    """Name of the prompt template around them; None for plain text."""
    max_length: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def packed(self) -> list[list[int]]:
        """The rows one after another in sequences of `max_length`, as training packs them: far fewer to run through the model."""
        joined = [number for row in self.rows for number in row]
        return [joined[start : start + self.max_length] for start in range(0, len(joined), self.max_length)]


def collect(
    project: Project,
    data: Path,
    model: Path,
    described: Mapping[str, Any],
    *,
    rows: int,
    max_length: int,
    progress: Progress,
) -> Calibration:
    """Tokenised rows of `data` with the template that `described` (the model's danlu.json) names, else the one that fits the model.

    Raises InputError `quantize.too_little`, `quantize.no_template`, and those of load_tokenizer and sniff.
    """
    progress.update(0, rows, message("quantize.progress.calibration"), unit="rows")
    detection = describe(project, data).detection
    template = _template(described, model) if has_template(detection.format) else None
    if template is None and has_template(detection.format):
        raise InputError("quantize.no_template", path=str(model))
    if tokenizer_file(project, model) is None:
        export_tokenizer(str(project.root), str(model), progress)
    tokenizer = load_tokenizer(project, model)
    found: list[list[int]] = []
    held_out: list[list[int]] = []
    for value in _draw(data, _SPARE * (rows + HELD_OUT)):
        ids = _encode(value, detection, template, tokenizer)[:max_length]
        if len(ids) < _SHORTEST:
            continue
        if len(found) < rows:
            found.append(ids)
            progress.update(len(found), rows, message("quantize.progress.calibration"), unit="rows")
        elif len(held_out) < HELD_OUT and ids not in found and ids not in held_out:
            held_out.append(ids)
    made = Calibration(found, held_out, template.name if template else None, max_length)
    if len(found) < FEWEST_ROWS or made.tokens < FEWEST_TOKENS:
        raise InputError(
            "quantize.too_little",
            path=str(data),
            rows=len(found),
            tokens=made.tokens,
            fewest_rows=FEWEST_ROWS,
            fewest_tokens=FEWEST_TOKENS,
        )
    return made


def _template(described: Mapping[str, Any], model: Path) -> PromptTemplate | None:
    recorded = described.get("prompt_template")
    if isinstance(recorded, dict):
        return PromptTemplate.from_json(recorded)
    name = guess_template(model)
    return prompt_templates().get(name) if name else None


def _draw(data: Path, count: int) -> list[Any]:
    """`count` values of the file, every one as likely as any other, in random order (Vitter's algorithm R)."""
    chooser = random.Random(0)  # noqa: S311 - variety, not secrecy
    kept: list[Any] = []
    seen = 0
    for item in read_rows(sniff(data)):
        if not isinstance(item, Row):
            continue
        seen += 1
        if len(kept) < count:
            kept.append(item.value)
        elif (place := chooser.randrange(seen)) < count:
            kept[place] = item.value
    chooser.shuffle(kept)
    return kept


def _encode(value: Any, detection: Detection, template: PromptTemplate | None, tokenizer: TextTokenizer) -> list[int]:
    """Token ids of one row, as core.data.preview makes them; none for a row that cannot be used."""
    try:
        segments = training_segments(value, detection.format, detection.columns, template, tokenizer)
    except InputError:
        return []
    texts = iter(tokenizer.encode([segment.text for segment in segments if segment.ids is None]))
    return [number for segment in segments for number in (next(texts) if segment.ids is None else segment.ids)]
