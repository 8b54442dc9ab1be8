"""One line on the monitor: the memory that was estimated before the start, and what the run took."""

import streamlit as st

from core.config.memory.comparison import Estimate, estimate_of, learn, measured_bytes
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.metrics import Metrics
from pages.ui.text import gib, t


@st.cache_resource(max_entries=32, show_spinner=False)
def _estimate(path: str, _run: RunDirectory, has_samples: bool) -> Estimate | None:  # noqa: ARG001
    """A run's config never changes; only its first GPU sample may not be there yet."""
    return estimate_of(_run)


def memory_line(project: Project, run: RunDirectory, metrics: Metrics) -> None:
    """Nothing on a CPU and before the second optimizer step. What was measured corrects later estimates."""
    estimate = _estimate(str(run.path), run, run.gpu_file.exists())
    measured = None if estimate is None else measured_bytes(estimate, metrics)
    if estimate is None or measured is None:
        return
    learn(project, run, estimate, measured)
    expected = estimate.budget.allocated_bytes
    words = {"estimated": gib(expected), "measured": gib(measured), "difference": f"{measured / expected - 1:+.1%}"}
    st.caption(t("budget.measured", **words), help=t("budget.measured_help"))
