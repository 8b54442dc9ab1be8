"""Environment: what the doctor found, the GPUs of this machine, the Python that trains, the way in from elsewhere."""

import os
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

import psutil
import streamlit as st

from core.environment.address import GUIDE_PORT, this_machine, tunnel_command
from core.environment.doctor import last_report
from core.environment.interpreters import Interpreter, choose_python, find_interpreters, training_python
from core.environment.report import Line, Report, Status
from core.errors import DanluError
from core.gpu import GpuSnapshot, devices
from core.project import Project
from core.runs.jobs import active_jobs
from core.runs.launch import start_job
from pages.ui import shell
from pages.ui.jobs import job_panel
from pages.ui.text import gib, say, show_error, t

KINDS = ("examine", "environment")
ICONS = {
    Status.GREEN: ":green[:material/check_circle:]",
    Status.AMBER: ":orange[:material/warning:]",
    Status.RED: ":red[:material/error:]",
}
GROUPS = ("python", "packages", "gpu", "machine")


def show_verdict(report: Report, python: Path) -> None:
    red, amber = report.count(Status.RED), report.count(Status.AMBER)
    if red:
        st.error(t("environment.broken", red=red), icon=":material/error:")
    elif amber:
        st.warning(t("environment.usable", amber=amber), icon=":material/warning:")
    else:
        st.success(t("environment.ready"), icon=":material/check_circle:")
    at = datetime.fromisoformat(report.examined_at).astimezone()
    st.caption(t("environment.examined", at=f"{at:%Y-%m-%d %H:%M}", python=report.python))
    if report.python != str(python):
        st.info(t("environment.other_python"), icon=":material/sync_problem:")


def show_line(line: Line) -> None:
    st.markdown(f"{ICONS[line.status]} **{line.name}** · {say(line.message)}")
    if line.fix and line.status is not Status.GREEN:
        st.code(line.fix, language="bash", wrap_lines=True)


def show_report(report: Report) -> None:
    """What is wrong stands open, the whole list is one click away."""
    for line in report.lines:
        if line.status is not Status.GREEN:
            show_line(line)
    with st.expander(t("environment.show_all", count=len(report.lines)), icon=":material/list:"):
        for column, groups in zip(st.columns(2), (("packages",), ("python", "gpu", "machine")), strict=True):
            for group in groups:
                column.caption(t(f"environment.groups_{group}"))
                for line in (line for line in report.lines if line.group == group):
                    column.markdown(f"{ICONS[line.status]} **{line.name}** · {say(line.message)}")


def show_gpu(gpu: GpuSnapshot) -> None:
    with st.container(border=True):
        st.markdown(f"**{gpu.index} · {gpu.name or 'GPU'}**")
        if gpu.memory_total_bytes and gpu.memory_used_bytes is not None:
            text = t("environment.gpu_memory", used=gib(gpu.memory_used_bytes), total=gib(gpu.memory_total_bytes))
            st.progress(min(gpu.memory_used_bytes / gpu.memory_total_bytes, 1.0), text=text)
        power = None if gpu.power_watts is None else round(gpu.power_watts)
        values = {"utilization": gpu.utilization_percent, "temperature": gpu.temperature_celsius, "power": power}
        shown = {name: "–" if value is None else value for name, value in values.items()}
        st.caption(t("environment.gpu_state", **shown))


@st.fragment(run_every=5.0)
def show_machine(root: Path) -> None:
    found = devices()
    if not found:
        with st.container(border=True):
            st.markdown(f":material/memory: {t('environment.cpu_only')}")
    for row in range(0, len(found), 2):
        for column, gpu in zip(st.columns(2), found[row : row + 2], strict=False):
            with column:
                show_gpu(gpu)
    ram, disk, cores = st.columns(3)
    memory = psutil.virtual_memory()
    ram.metric(t("environment.ram"), gib(memory.available), border=True)
    disk.metric(t("environment.disk"), gib(shutil.disk_usage(root).free), border=True)
    cores.metric(t("environment.cores"), os.cpu_count() or "–", border=True)


def name_of(interpreter: Interpreter) -> str:
    xtuner = f"XTuner {interpreter.xtuner}" if interpreter.xtuner else t("environment.no_xtuner")
    return f"{interpreter.name} · {t(f'environment.sources_{interpreter.source}')} · {xtuner}"


def show_interpreters(project: Project, python: Path) -> None:
    found = {str(item.python): item for item in find_interpreters(project, shell.settings().python)}
    options = list(found)
    index = options.index(str(python)) if str(python) in options else None
    chosen = st.selectbox(
        t("environment.python_used"),
        options,
        index=index,
        key=f"environment_python_{python}",
        format_func=lambda path: name_of(found[path]),
        help=t("environment.python_help"),
    )
    other = st.text_input(
        t("environment.python_other"), key="environment_other", help=t("environment.python_other_help")
    )
    wanted = other.strip() or chosen
    left, right = st.columns(2)
    if left.button(
        t("environment.use_it"), key="environment_use", disabled=not wanted or wanted == str(python), width="stretch"
    ):
        choose_python(project, Path(str(wanted)))
        st.rerun()
    if right.button(
        t("environment.create"), key="environment_create", help=t("environment.create_help"), width="stretch",
        disabled=bool(active_jobs(project, KINDS)),
    ):  # fmt: skip
        target = str(project.private / "env")
        arguments = {"target": target, "python": sys.executable}
        function = "core.environment.doctor:create_environment"
        start_job(project, function, kind="environment", title=project.name, arguments=arguments)
        st.rerun()


def show_tunnel() -> None:
    user, host, port = this_machine()
    columns = st.columns([2, 3, 1])
    user = columns[0].text_input(t("environment.tunnel_user"), user, key="environment_tunnel_user")
    host = columns[1].text_input(t("environment.tunnel_host"), host, key="environment_tunnel_host")
    port = columns[2].number_input(t("environment.tunnel_port"), 1, 65535, port, key="environment_tunnel_port")
    if not (re.fullmatch(r"[\w.-]+", user) and re.fullmatch(r"[\w.:-]+", host)):
        st.warning(t("environment.tunnel_bad"))
        return
    app_port = int(st.get_option("server.port") or GUIDE_PORT)
    st.code(tunnel_command(user, host, ssh_port=int(port), port=app_port), language="bash", wrap_lines=True)
    st.caption(t("environment.tunnel_help", port=app_port))


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
    st.rerun()
job_panel(project, KINDS)
if report is not None:
    show_report(report)
show_machine(project.root)
with st.expander(t("environment.python_used"), icon=":material/terminal:"):
    try:
        show_interpreters(project, python)
    except DanluError as error:
        show_error(error)
with st.expander(t("environment.tunnel"), icon=":material/lan:"):
    show_tunnel()
