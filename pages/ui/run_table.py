"""The table of runs, their loss curves over each other, and the trash."""

from datetime import datetime

import pandas as pd
import streamlit as st

from core.errors import DanluError
from core.project import Project
from core.runs.control import TrashEntry, delete, list_trash, restore
from core.runs.curves import smooth
from core.runs.directory import RunDirectory
from core.runs.summary import RunSummary
from pages.ui.charts import Line, line_chart
from pages.ui.run_data import metrics_of
from pages.ui.text import duration, show_error, t

_SMOOTHING = 0.9


def run_table(rows: list[RunSummary]) -> list[RunSummary]:
    """Show the rows; those that are selected."""
    names = ("run", "status", "steps", "loss", "duration", "speed", "memory", "config", "model", "data", "created")
    table = pd.DataFrame([_cells(row) for row in rows], columns=list(names))
    number = st.column_config.NumberColumn
    event = st.dataframe(
        table,
        key="runs_table",
        hide_index=True,
        width="stretch",
        on_select="rerun",
        selection_mode="multi-row",
        column_config={name: t(f"runs.columns.{name}") for name in names}
        | {
            "loss": number(t("runs.columns.loss"), format="%.4f"),
            "speed": number(t("runs.columns.speed"), format="%.0f"),
            "memory": number(t("runs.columns.memory"), format="%.2f"),
            "created": st.column_config.DatetimeColumn(t("runs.columns.created"), format="YYYY-MM-DD HH:mm"),
        },
    )
    return [rows[number] for number in event.selection.rows if number < len(rows)]


def compare_losses(rows: list[RunSummary]) -> None:
    """Smoothed loss of each run over iterations, in one chart."""
    lines = {}
    for row in rows:
        metrics = metrics_of(row.run)
        if metrics.has("loss"):
            lines[row.run.id] = Line(metrics["iteration"], smooth(metrics["loss"], _SMOOTHING))
    if lines:
        line_chart(t("runs.compare"), lines, x_title=t("monitor.step_axis"), height=320)
    else:
        st.caption(t("runs.compare_empty"))


def confirm_delete(project: Project, runs: list[RunDirectory]) -> None:
    """Ask, then move the runs to the trash."""
    title = t("runs.delete_title") if len(runs) == 1 else t("runs.delete_many", count=len(runs))

    @st.dialog(title)
    def confirm() -> None:
        st.markdown(t("runs.delete_body", run="**, **".join(run.id for run in runs)))
        keep, yes = st.columns(2)
        if keep.button(t("runs.keep"), key="runs_keep", width="stretch"):
            st.rerun()
        if yes.button(t("runs.delete"), key="runs_delete_yes", type="primary", width="stretch"):
            try:
                entries = [delete(project, run) for run in runs]
            except DanluError as error:
                show_error(error)
                return
            st.session_state["runs_deleted"] = [str(entry.path) for entry in entries]
            st.rerun()

    confirm()


def trash(project: Project) -> None:
    """The undo for what was just deleted, and everything else that is in the trash."""
    entries = list_trash(project)
    just_deleted = [entry for entry in entries if str(entry.path) in st.session_state.get("runs_deleted", [])]
    if just_deleted:
        text, undo = st.columns([5, 1], vertical_alignment="center")
        text.info(t("runs.deleted", run=", ".join(entry.origin.name for entry in just_deleted)))
        if undo.button(t("runs.undo"), key="runs_undo", icon=":material/undo:", width="stretch"):
            _restore(just_deleted)
    if entries:
        with st.expander(t("runs.trash", count=len(entries))):
            st.caption(t("runs.trash_note", path=str(entries[0].path.parent)))
            for entry in entries:
                name, back = st.columns([5, 1], vertical_alignment="center")
                name.text(f"{entry.origin.name} · {datetime.fromtimestamp(entry.deleted_at):%Y-%m-%d %H:%M}")
                if back.button(t("runs.restore"), key=f"runs_restore_{entry.path.name}", width="stretch"):
                    _restore([entry])


def _restore(entries: list[TrashEntry]) -> None:
    try:
        for entry in entries:
            restore(entry)
    except DanluError as error:
        show_error(error)
        return
    st.session_state.pop("runs_deleted", None)
    st.rerun()


def _cells(row: RunSummary) -> tuple[object, ...]:
    total = row.total_iterations
    peak = row.peak_memory_bytes
    started = row.status.started_at
    return (
        row.run.id if row.is_ours else f"{row.run.id} ({t('runs.by_hand')})",
        t(f"runs.phases.{row.status.phase}"),
        f"{row.iteration} / {total}" if total else str(row.iteration or "–"),
        row.loss,
        "–" if row.elapsed_seconds is None else duration(row.elapsed_seconds),
        row.tokens_per_second,
        None if peak is None else peak / 2**30,
        row.config or "",
        row.base_model or "",
        row.data or "",
        None if started is None else datetime.fromtimestamp(started),
    )
