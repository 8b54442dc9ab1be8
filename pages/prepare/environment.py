"""Environment: what the doctor found, the GPUs of this machine, the Python that trains, the way in from elsewhere."""

import sys
from pathlib import Path

import streamlit as st

from core.environment.doctor import last_report
from core.environment.interpreters import training_python
from core.errors import DanluError
from core.runs.jobs import active_jobs
from core.runs.launch import start_job
from pages.ui import shell
from pages.ui.archive import show_archive
from pages.ui.audit import note, show_log
from pages.ui.environment_python import KINDS, show_creation, show_interpreters, show_tunnel
from pages.ui.environment_report import show_machine, show_report, show_verdict
from pages.ui.jobs import job_panel
from pages.ui.text import show_error, t

project = shell.require_project()
shell.page_header("environment")
try:
    python = training_python(project, shell.settings().python)
except DanluError as error:
    show_error(error)
    python = Path(sys.executable)
report = last_report(project.root)
if report is None:
    st.info(t("environment.never"), icon=":material/stethoscope:")
else:
    show_verdict(report, python)
label = t("environment.check") if report is None else t("environment.check_again")
if st.button(
    label, key="environment_check", type="secondary" if report else "primary", icon=":material/stethoscope:",
    disabled=bool(active_jobs(project, KINDS)),
):  # fmt: skip
    arguments = {"python": str(python), "project_root": str(project.root)}
    start_job(
        project, "core.environment.doctor:run_examination", kind="examine", title=str(python), arguments=arguments
    )
    note("start", "examine")
    st.rerun()
job_panel(project, KINDS)
show_creation(project, python)
if report is not None:
    show_report(report)
show_machine(project.root)
with st.expander(t("environment.python_used"), icon=":material/terminal:"):
    try:
        show_interpreters(project, python)
    except DanluError as error:
        show_error(error)
for key, icon, show in (
    ("archive", ":material/inventory_2:", lambda: show_archive(project)),
    ("audit", ":material/history_edu:", show_log),
):
    with st.expander(t(f"{key}.title"), icon=icon, key=f"environment_{key}", on_change="rerun") as box:
        if box.open:  # both read many files
            show()
with st.expander(t("environment.tunnel"), icon=":material/lan:"):
    show_tunnel()
