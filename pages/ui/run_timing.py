"""What a run waited for besides its steps: the start-up by phase, and the saving of checkpoints."""

import streamlit as st

from core.runs.directory import RunDirectory
from core.runs.saving import Saving, read_saving
from core.runs.startup import Startup, read_startup
from core.runs.state import RunStatus
from pages.ui.text import t

_SHOWN_SECONDS = 0.05
"""A shorter phase is left out of the line."""


def run_timing(run: RunDirectory, status: RunStatus) -> None:
    """One line each; nothing before the first step or checkpoint, nor for a run that was not started by the app."""
    if startup := read_startup(run.path, status.started_at):
        st.caption(f":material/timer: {_startup_line(startup)}", help=t("timing.startup_help"))
    if (saving := read_saving(run.path)) and saving.count:
        st.caption(f":material/save: {_saving_line(saving)}")


def _startup_line(startup: Startup) -> str:
    named = [
        t("timing.phase", name=t(f"timing.phases.{name}"), seconds=_seconds(seconds))
        for name, seconds in startup.seconds.items()
        if seconds >= _SHOWN_SECONDS
    ]
    return t("timing.startup", total=_seconds(startup.total_seconds), phases=t("timing.and").join(named))


def _saving_line(saving: Saving) -> str:
    parts = [t("timing.saved", count=saving.count, seconds=_seconds(saving.waited_seconds))]
    if saving.behind == saving.count:
        parts.append(t("timing.behind"))
    elif saving.why:
        parts.append(t(f"timing.why_{saving.why}", count=saving.count - saving.behind))
    return " ".join(parts)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"
