"""Makes the guide's personal_assistant.json: rows that teach a model its name and its author. Deterministic for a seed."""

import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from core.data.assistant_phrases import PHRASES, Phrases
from core.data.convert import place, write_manifest
from core.errors import InputError, MachineError
from core.files import within
from core.project import Project

FILE_NAME: Final = "personal_assistant.json"
MOST_ROWS: Final = 20_000
_MOST_NAME: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Assistant:
    """Who the model is to be."""

    name: str
    author: str
    language: str = "zh"
    """`zh`, `en` or `both`."""
    rows: int = 400
    general_share: float = 0.1
    """Share of everyday rows, 0–0.5, so that the model does not answer everything with its name."""
    system: str = ""
    seed: int = 0


def generate(assistant: Assistant) -> list[dict[str, Any]]:
    """Rows in OpenAI's `messages` format, shuffled. Every question has one fixed answer.

    Raises InputError `data.bad_assistant` for an empty or unusable name, `data.bad_rows`.
    """
    _check(assistant)
    languages = ("zh", "en") if assistant.language == "both" else (assistant.language,)
    chooser = random.Random(assistant.seed)  # noqa: S311 - variety, not secrecy
    general = round(assistant.rows * assistant.general_share)
    pairs: list[tuple[str, str]] = []
    for at, language in enumerate(languages):
        phrases = PHRASES[language]
        pairs += _identity(phrases, assistant, _part(assistant.rows - general, at, len(languages)), chooser)
        pairs += _general(phrases, _part(general, at, len(languages)), chooser)
    chooser.shuffle(pairs)
    return [_row(question, answer, assistant.system) for question, answer in pairs]


def write_assistant(project: Project, assistant: Assistant, name: str = FILE_NAME) -> Path:
    """Write the rows as a JSON list into `project.data` under `name`, or the next free name. Returns the path."""
    rows = generate(assistant)
    target = within(project.data / name, project.data)
    text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
    path = write_new(target, text.encode("utf-8"))
    settings = {
        "name": assistant.name,
        "author": assistant.author,
        "language": assistant.language,
        "general_share": assistant.general_share,
        "seed": assistant.seed,
    }
    write_manifest(project, path, {"made_by": "generate", "assistant": settings, "rows_out": len(rows)})
    return path


def write_new(target: Path, content: bytes) -> Path:
    """Write a new file that appears whole, under `target` or the next free name. Raises MachineError `files.cannot_write`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        return place(Path(temporary), target)
    except OSError as error:
        raise MachineError("files.cannot_write", path=str(target), reason=error.strerror or str(error)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _check(assistant: Assistant) -> None:
    for field in ("name", "author"):
        value = getattr(assistant, field)
        is_odd = any(ord(character) < 32 or character in "<>|{}[]" for character in value)
        if not value.strip() or len(value) > _MOST_NAME or is_odd:
            raise InputError("data.bad_assistant", field=field, value=value[:_MOST_NAME], limit=_MOST_NAME)
    if not 10 <= assistant.rows <= MOST_ROWS:
        raise InputError("data.bad_rows", rows=assistant.rows, least=10, most=MOST_ROWS)
    if not 0 <= assistant.general_share <= 0.5 or assistant.language not in (*PHRASES, "both"):
        raise ValueError(f"general_share {assistant.general_share}, language {assistant.language!r}")


def _identity(phrases: Phrases, assistant: Assistant, count: int, chooser: random.Random) -> list[tuple[str, str]]:
    """`count` questions with answers, topics by weight; plain questions come first, then ever more varied ones."""
    streams = [cycle(_questions(topic.questions, phrases, chooser)) for topic in phrases.topics]
    turns = cycle([at for at, topic in enumerate(phrases.topics) for _ in range(topic.weight)])
    answers = [
        topic.answer.format(name=assistant.name.strip(), author=assistant.author.strip()) for topic in phrases.topics
    ]
    return [(next(streams[at]), answers[at]) for _, at in zip(range(count), turns, strict=False)]


def _questions(questions: tuple[str, ...], phrases: Phrases, chooser: random.Random) -> list[str]:
    """Each question as it stands, then with an opening, a closing, or both, in random order without repetition."""
    varied = [
        _join(opening, question, closing)
        for question in questions
        for opening in phrases.openings
        for closing in phrases.closings
        if opening or closing
    ]
    chooser.shuffle(varied)
    return [*questions, *varied]


def _join(opening: str, question: str, closing: str) -> str:
    if opening.endswith((", ", ": ")) and not question.startswith("I "):
        question = question[0].lower() + question[1:]
    return f"{opening}{question}{closing}"


def _general(phrases: Phrases, count: int, chooser: random.Random) -> list[tuple[str, str]]:
    pairs = list(phrases.general)
    chooser.shuffle(pairs)
    varied = [(_join(opening, question, ""), answer) for opening in phrases.openings for question, answer in pairs]
    endless: Iterator[tuple[str, str]] = cycle(varied)
    return [next(endless) for _ in range(count)]


def _part(total: int, at: int, parts: int) -> int:
    return total // parts + (at < total % parts)


def _row(question: str, answer: str, system: str) -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system.strip() else []
    return {"messages": [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
