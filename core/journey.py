"""Which steps of the journey a project has behind it, read from the disk each time. Knows the folders, not what made them."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from core.data.library import SUFFIXES
from core.environment.doctor import last_report
from core.environment.report import Status
from core.project import Project
from core.runs.jobs import list_runs
from core.runs.pace import ask_all
from core.runs.state import Phase, read_status

STEPS: Final = ("environment", "model", "dataset", "config", "launch", "monitor", "export", "chat")
"""The journey in its order, by page names."""


class StepState(StrEnum):
    """How far one step is."""

    OPEN = "open"
    ACTIVE = "active"
    DONE = "done"


def steps(project: Project | None) -> dict[str, StepState]:
    """State of each step by page name; a page without a step is not named."""
    if project is None:
        return {}
    report = last_report(project.root)
    phases = [status.phase for status in ask_all(read_status, list_runs(project))]
    trained = any(phase in (Phase.FINISHED, Phase.STOPPED) for phase in phases)
    return {
        "environment": _done(report is not None and report.status is not Status.RED),
        "model": _done(_has_model(project.model)),
        "dataset": _done(any(file.suffix.lower() in SUFFIXES for file in project.data.rglob("[!.]*"))),
        "config": _done(any(project.config.glob("*.py"))),
        "launch": _done(bool(phases)),
        "monitor": StepState.ACTIVE if any(phase.is_active for phase in phases) else _done(trained),
        "export": _done(_has_model(project.final_model)),
        "chat": _done(any(project.chat.glob("*.json"))),
    }


def next_step(states: Mapping[str, StepState]) -> str | None:
    """The first step that is not done; none at the end of the journey."""
    return next((step for step in STEPS if states.get(step) is not StepState.DONE), None)


def _has_model(folder: Path) -> bool:
    """As in the guide, a model may lie in the folder itself or in one of its folders."""
    found: Iterable[Path] = (file for pattern in ("config.json", "*/config.json") for file in folder.glob(pattern))
    return any(not file.parent.name.startswith(".") for file in found)


def _done(is_done: bool) -> StepState:
    return StepState.DONE if is_done else StepState.OPEN
