"""Runs: every training run of the project, searched, compared, noted, opened, exported, deleted."""

import streamlit as st

from core.runs.jobs import look_at_runs
from core.runs.summary import RunSummary
from pages.ui import shell
from pages.ui.run_compare import compare_losses, compare_settings, downloads
from pages.ui.run_data import summaries_of
from pages.ui.run_table import confirm_delete, edit_notes, filter_rows, run_table, trash
from pages.ui.text import t


def act_on(selected: list[RunSummary], rows: list[RunSummary]) -> None:
    """Buttons for what is selected; those for one run only where one is."""
    with st.container(horizontal=True):
        if len(selected) == 1:
            if st.button(t("runs.open"), key="runs_open", icon=":material/monitoring:", type="primary"):
                st.switch_page(shell.PAGES["monitor"], query_params={"run": selected[0].run.id})
            edit_notes(selected[0], rows)
            downloads(project, selected[0].run)
        is_removable = all(row.is_ours and not row.status.phase.is_active for row in selected)
        if st.button(t("runs.delete"), key="runs_delete", icon=":material/delete:", disabled=not is_removable):
            confirm_delete(project, [row.run for row in selected])


project = shell.require_project()
shell.page_header("runs")
every = summaries_of(look_at_runs(project))
if every:
    shown = filter_rows(every)
    chosen = run_table(shown) if shown else []
    if not shown:
        st.caption(t("runs.nothing_found"))
    elif chosen:
        act_on(chosen, every)
        compare_losses(chosen)
        if len(chosen) > 1:
            compare_settings(chosen)
    else:
        st.caption(t("runs.select_hint"))
else:
    shell.missing(t("runs.empty"), "launch")
trash(project)
