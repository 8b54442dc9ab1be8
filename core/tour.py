"""The tour of a first visit: a project with the embedded model and a small data set, and whether its hints are shown in it.

Knows the steps by their page names and the file that remembers; the words and where they stand are the pages' matter.
"""

from pathlib import Path
from typing import Final

from core.data.generate import Assistant, generate, write_assistant
from core.errors import InputError
from core.files import free_path, read_json, write_json
from core.journey import STEPS
from core.models.embedded import NAME
from core.project import Project, create_project
from core.runs.launch import start_job

PROJECT_NAME: Final = "first_try"
ASSISTANT: Final = "Danlu"
"""What the model will call itself. The data are in English: the embedded model was made from English text, and learns Chinese slowly."""
_ROWS: Final = 150
"""About forty updates with the recipe `first_try`."""


def start_tour(home: Path, *, author: str) -> Project:
    """A new project of its own: data written, the embedded model being written by a job, hints on.

    Raises InputError `data.bad_assistant` for an unusable author before anything is made.
    """
    assistant = Assistant(name=ASSISTANT, author=author, language="en", rows=_ROWS)
    generate(assistant)
    project = create_project(home, free_path(home / PROJECT_NAME).name)
    write_assistant(project, assistant)
    start_job(
        project,
        "core.models.embedded:write_embedded_model",
        kind="dequantize",
        title=NAME,
        arguments={"target": str(project.model / NAME)},
    )
    show_hints(project, True)
    return project


def has_hints(project: Project) -> bool:
    """Whether the hints of the tour are shown in this project; a file that cannot be read counts as no."""
    try:
        kept = read_json(_file(project))
    except InputError:
        return False
    return isinstance(kept, dict) and kept.get("is_shown") is True


def show_hints(project: Project, is_shown: bool) -> None:
    """Remember in the project whether the hints are shown."""
    write_json(_file(project), {"schema_version": 1, "is_shown": is_shown})


def next_page(page: str) -> str | None:
    """The step after this one; none after the last."""
    later = STEPS[STEPS.index(page) + 1 :]
    return later[0] if later else None


def _file(project: Project) -> Path:
    return project.private / "tour.json"
