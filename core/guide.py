"""The user guide of docs/ by chapters, for the pages that show it. Knows its headings and which page each is about; draws nothing."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[1] / "docs"
CHAPTERS: Final = {
    "start": "0",
    "environment": "0",
    "model": "1.2",
    "dataset": "1.1",
    "config": "1.3",
    "launch": "1.5",
    "monitor": "1.5",
    "runs": "1.5",
    "export": "1.6",
    "chat": "1.8",
}
"""Page → number of the chapter that it is about."""
_HEADING: Final = re.compile(r"^(#{2,3}) (.+)$", re.MULTILINE)
_PICTURE: Final = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+)\)\s*$", re.MULTILINE)
_FILE_LINK: Final = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Chapter:
    """One chapter: what stands below a heading, up to the next one."""

    number: str
    """`1.3` of “1.3–1.4 Config”; empty for what stands before the first heading."""
    title: str
    level: int
    parts: tuple[str | tuple[str, Path], ...]
    """Markdown, and pictures as (alternative text, file), in their order."""

    @property
    def text(self) -> str:
        """The chapter without its pictures: whoever reads it beside a page has the page before them."""
        return "\n\n".join(part for part in self.parts if isinstance(part, str))


@cache
def chapters(language: str) -> tuple[Chapter, ...]:
    """The guide of `language` from its start, read once; links to other files of docs/ become their names."""
    text = (FOLDER / f"guide_{language}.md").read_text(encoding="utf-8")
    text = _PICTURE.sub(lambda found: f"\0{found[1]}\0{found[2]}\0", text)
    text = _FILE_LINK.sub(r"`docs/\2`", text)
    found = [*_HEADING.finditer(text)]
    starts, ends = [heading.end() for heading in found], [*(heading.start() for heading in found[1:]), len(text)]
    opening = Chapter("", "", 1, _parts(re.sub(r"^# .*\n", "", text[: found[0].start()])))
    return (
        opening,
        *(
            Chapter(_number(heading[2]), heading[2], len(heading[1]), _parts(text[start:end]))
            for heading, start, end in zip(found, starts, ends, strict=True)
        ),
    )


def chapter_of(page: str, language: str) -> Chapter:
    """The chapter about this page. Raises KeyError for a page that has none."""
    number = CHAPTERS[page]
    return next(chapter for chapter in chapters(language) if chapter.number == number)


def _number(title: str) -> str:
    found = re.match(r"\d+(\.\d+)?", title)
    return found[0] if found else ""


def _parts(text: str) -> tuple[str | tuple[str, Path], ...]:
    """Texts and pictures alternate: three pieces a picture, its name and its file in the middle."""
    pieces = text.split("\0")
    parts: list[str | tuple[str, Path]] = []
    for at in range(0, len(pieces), 3):
        if pieces[at].strip():
            parts.append(pieces[at].strip("\n"))
        if at + 2 < len(pieces):
            parts.append((pieces[at + 1], FOLDER / pieces[at + 2]))
    return tuple(parts)
