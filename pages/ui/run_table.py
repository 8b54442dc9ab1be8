"""The table of runs with its search, what a person notes about one, and the trash."""

from datetime import datetime

import pandas as pd
import streamlit as st

from core.errors import DanluError
from core.project import Project
from core.runs.control import TrashEntry, delete, list_trash, restore
from core.runs.directory import RunDirectory
from core.runs.notes import Notes, write_notes
from core.runs.summary import RunSummary
from pages.ui.audit import note
from pages.ui.text import duration, show_error, t

_COLUMNS = (
    "run", "status", "steps", "loss", "validation", "duration", "tokens", "speed", "memory", "energy", "config", "model",
    "data", "tags", "note", "created",
)  # fmt: skip


def filter_rows(rows: list[RunSummary]) -> list[RunSummary]:
    """The rows that hold every word of the search, somewhere in names, tags or note, and have one of the chosen tags."""
    tags = sorted({tag for row in rows for tag in row.notes.tags})
    search, chosen = st.columns([3, 2], vertical_alignment="bottom")
    words = search.text_input(
        t("runs.search"), key="runs_search", placeholder=t("runs.search"), label_visibility="collapsed"
    )
    wanted = (
        chosen.multiselect(
            t("runs.tags"), tags, key="runs_tags", placeholder=t("runs.tags"), label_visibility="collapsed"
        )
        if tags
        else []
    )
    needles = words.casefold().split()
    return [row for row in rows if set(wanted) <= set(row.notes.tags) and all(word in _text(row) for word in needles)]


def run_table(rows: list[RunSummary]) -> list[RunSummary]:
    """Show the rows; those that are selected. Columns that no run fills are left out."""
    table = pd.DataFrame([_cells(row) for row in rows], columns=list(_COLUMNS))
    names = [name for name in _COLUMNS if name in ("run", "status") or _is_filled(table[name])]
    number = st.column_config.NumberColumn
    event = st.dataframe(
        table[names],
        key="runs_table",
        hide_index=True,
        width="stretch",
        on_select="rerun",
        selection_mode="multi-row",
        column_config={name: t(f"runs.columns.{name}") for name in _COLUMNS}
        | {
            "loss": number(t("runs.columns.loss"), format="%.4f", help=t("runs.loss_help")),
            "validation": number(t("runs.columns.validation"), format="%.4f"),
            "tokens": number(t("runs.columns.tokens"), format="compact"),
            "speed": number(t("runs.columns.speed"), format="%.0f"),
            "memory": number(t("runs.columns.memory"), format="%.2f"),
            "energy": number(t("runs.columns.energy"), format="%.3f"),
            "tags": st.column_config.ListColumn(t("runs.columns.tags")),
            "created": st.column_config.DatetimeColumn(t("runs.columns.created"), format="YYYY-MM-DD HH:mm"),
        },
    )
    return [rows[number] for number in event.selection.rows if number < len(rows)]


def edit_notes(row: RunSummary, rows: list[RunSummary]) -> None:
    """Tags and note of one run."""
    known = sorted({tag for each in rows for tag in each.notes.tags})
    with st.popover(t("runs.notes"), icon=":material/edit_note:", key="runs_notes"):
        tags = st.multiselect(
            t("runs.tags"),
            known,
            default=row.notes.tags,
            accept_new_options=True,
            key=f"runs_tags_{row.run.id}",
            help=t("runs.tags_help"),
        )
        text = st.text_area(t("runs.note"), row.notes.text, key=f"runs_note_{row.run.id}", help=t("runs.note_help"))
        if st.button(t("runs.save_notes"), key="runs_save_notes", type="primary"):
            try:
                write_notes(row.run, Notes(tuple(tags), text))
            except DanluError as error:
                show_error(error)
                return
            st.rerun()


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
                entries = [_delete(project, run) for run in runs]
            except DanluError as error:
                show_error(error)
                return
            st.session_state["runs_deleted"] = [str(entry.path) for entry in entries]
            st.rerun()

    confirm()


def _delete(project: Project, run: RunDirectory) -> TrashEntry:
    entry = delete(project, run)
    note("delete", run.id)
    return entry


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
            note("restore", restore(entry).id)
    except DanluError as error:
        show_error(error)
        return
    st.session_state.pop("runs_deleted", None)
    st.rerun()


def _text(row: RunSummary) -> str:
    parts = (row.run.id, row.title, row.config, row.base_model, row.data, row.notes.text, *row.notes.tags)
    return " ".join([*filter(None, parts), t(f"runs.phases.{row.status.phase}")]).casefold()


def _is_filled(column: "pd.Series[object]") -> bool:
    return bool(
        column.map(
            lambda value: value not in ("", "–") and (isinstance(value, list) or pd.notna(value)) and value != []
        ).any()
    )


def _cells(row: RunSummary) -> tuple[object, ...]:
    total = row.total_iterations
    peak = row.peak_memory_bytes
    started = row.status.started_at
    return (
        row.run.id if row.is_ours else f"{row.run.id} ({t('runs.by_hand')})",
        t(f"runs.phases.{row.status.phase}"),
        f"{row.iteration} / {total}" if total else str(row.iteration or "–"),
        row.loss,
        row.validation_loss,
        "–" if row.elapsed_seconds is None else duration(row.elapsed_seconds),
        row.tokens,
        row.tokens_per_second,
        None if peak is None else peak / 2**30,
        row.energy_kwh,
        row.config or "",
        row.base_model or "",
        row.data or "",
        list(row.notes.tags),
        row.notes.text,
        None if started is None else datetime.fromtimestamp(started),
    )
