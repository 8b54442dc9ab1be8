"""Runs: every training run of the project, compared, opened, deleted."""

import streamlit as st

from core.runs.jobs import list_runs
from core.runs.summary import summarize
from pages.ui import shell
from pages.ui.run_data import metrics_of
from pages.ui.run_table import compare_losses, confirm_delete, run_table, trash
from pages.ui.text import t

project = shell.require_project()
shell.page_header("runs")
rows = [summarize(run, metrics_of(run)) for run in list_runs(project)]
if rows:
    selected = run_table(rows)
    if selected:
        open_one, remove, _ = st.columns([1.4, 1, 4])
        if open_one.button(
            t("runs.open"), key="runs_open", icon=":material/monitoring:", disabled=len(selected) != 1, width="stretch"
        ):
            st.switch_page(shell.PAGES["monitor"], query_params={"run": selected[0].run.id})
        is_removable = all(row.is_ours and not row.status.phase.is_active for row in selected)
        if remove.button(
            t("runs.delete"), key="runs_delete", icon=":material/delete:", disabled=not is_removable, width="stretch"
        ):
            confirm_delete(project, [row.run for row in selected])
        compare_losses(selected)
    else:
        st.caption(t("runs.select_hint"))
else:
    shell.missing(t("runs.empty"), "launch")
trash(project)
