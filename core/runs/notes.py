"""Tags and a note that a person gives a run, in notes.json of its folder. Works for work dirs made by hand too."""

from dataclasses import dataclass
from typing import Final

from core.errors import DanluError
from core.files import read_json, write_json
from core.runs.directory import RunDirectory

_MOST_TAGS: Final = 20
_LONGEST_TAG: Final = 40


@dataclass(frozen=True, slots=True)
class Notes:
    """What a person wrote about a run."""

    tags: tuple[str, ...] = ()
    text: str = ""


def read_notes(run: RunDirectory) -> Notes:
    """Empty if there are none, or if they cannot be read."""
    try:
        value = read_json(run.notes_file)
    except DanluError:
        return Notes()
    if not isinstance(value, dict):
        return Notes()
    tags = value.get("tags")
    return Notes(clean_tags(tags if isinstance(tags, list) else []), str(value.get("text") or ""))


def write_notes(run: RunDirectory, notes: Notes) -> None:
    """Raises MachineError if the folder cannot be written."""
    write_json(run.notes_file, {"tags": list(clean_tags(list(notes.tags))), "text": notes.text.strip()})


def clean_tags(tags: list[str]) -> tuple[str, ...]:
    """Without spaces around, empty ones and repetitions."""
    stripped = (str(tag).strip()[:_LONGEST_TAG] for tag in tags)
    return tuple(dict.fromkeys(tag for tag in stripped if tag))[:_MOST_TAGS]
