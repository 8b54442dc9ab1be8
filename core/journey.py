"""Which steps of the journey a project has behind it, read from the disk each time. Knows the folders, not what made them."""

from enum import StrEnum

from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.state import Phase, read_status


class StepState(StrEnum):
    """How far one step is."""

    OPEN = "open"
    ACTIVE = "active"
    DONE = "done"


def steps(project: Project | None) -> dict[str, StepState]:
    """State of each step by page name; a page without a step is not named."""
    if project is None:
        return {}
    runs = train_runs(project)
    phases = [read_status(run).phase for run in runs]
    trained = any(phase in (Phase.FINISHED, Phase.STOPPED) for phase in phases)
    merged = any(project.final_model.glob("*/danlu.json"))
    return {
        "model": _done(any(project.model.glob("config.json")) or any(project.model.glob("*/config.json"))),
        "dataset": _done(any(project.data.glob("*.json")) or any(project.data.glob("*.jsonl"))),
        "config": _done(any(project.config.glob("*.py"))),
        "launch": _done(bool(runs)),
        "monitor": StepState.ACTIVE if any(phase.is_active for phase in phases) else _done(trained),
        "export": _done(merged),
        "chat": _done(any(project.chat.glob("*.json"))),
    }


def train_runs(project: Project) -> list[RunDirectory]:
    """Runs of this project made by the app, oldest first."""
    return [RunDirectory(spec.parent) for spec in sorted(project.train.glob("*/run.json"))]


def _done(is_done: bool) -> StepState:
    return StepState.DONE if is_done else StepState.OPEN
