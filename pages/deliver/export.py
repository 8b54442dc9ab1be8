"""Export: a checkpoint becomes an adapter, a merged model, and both are checked; below, everything that was delivered."""

import streamlit as st

from core.checkpoints.deliverables import list_deliverables
from core.errors import DanluError
from core.runs.jobs import list_runs
from pages.ui import shell
from pages.ui.export_choice import choose_checkpoint, choose_options, show_plan
from pages.ui.export_combination import combination_panel
from pages.ui.export_leftovers import leftovers_panel
from pages.ui.export_list import deliverables_list
from pages.ui.jobs import job_panel
from pages.ui.text import show_error, t

project = shell.require_project()
shell.page_header("export")
job_panel(project, ("adapter", "merge", "gguf", "fp8", "quantize", "upload", "verify"))
delivered = list_deliverables(project)
try:
    card = choose_checkpoint(project, list_runs(project))
    if card is None:
        shell.missing(t("export.no_checkpoints"), "launch")
    elif card.problem is not None:
        show_error(card.problem)
    else:
        left, right = st.columns(2, gap="large")
        with left:
            options = choose_options(card)
        with right:
            show_plan(project, card, options, delivered)
except DanluError as error:
    show_error(error)
combination_panel(project, delivered)
leftovers_panel(project)
deliverables_list(project, delivered)
