"""The Python that trains: choose one, make a new environment and watch it being made; the tunnel to this machine."""

import re
import sys
import time
from pathlib import Path

import streamlit as st

from core.environment.address import GUIDE_PORT, this_machine, tunnel_command
from core.environment.interpreters import Interpreter, choose_python, find_interpreters
from core.project import Project
from core.runs.jobs import active_jobs, latest_job
from core.runs.launch import start_job
from core.runs.logs import log_file, read_tail
from core.runs.state import Phase, read_status
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.run_log import show_lines
from pages.ui.text import t

KINDS = ("examine", "environment")
_KEEP_SHOWING_SECONDS = 3600.0
_ENVIRONMENT = "env"
"""Below the project's private folder: a link to the environment that the page made."""


def show_interpreters(project: Project, python: Path) -> None:
    found = {str(item.python): item for item in find_interpreters(project, shell.settings().python)}
    options = list(found)
    index = options.index(str(python)) if str(python) in options else None
    chosen = st.selectbox(
        t("environment.python_used"),
        options,
        index=index,
        key=f"environment_python_{python}",
        format_func=lambda path: _name_of(found[path]),
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
        arguments = {"target": str(project.private / _ENVIRONMENT), "python": sys.executable}
        function = "core.environment.doctor:create_environment"
        start_job(project, function, kind="environment", title=project.name, arguments=arguments)
        note("start", "environment")
        st.rerun()


def show_creation(project: Project, python: Path) -> None:
    """The log of an environment being made, live; after a failure, what to read; after success, the offer to use it."""
    run = latest_job(project, ("environment",))
    if run is None:
        return
    status = read_status(run)
    phase = status.phase
    made = project.private / _ENVIRONMENT / "bin/python"
    if phase is Phase.FINISHED:
        if made.exists() and python != made:
            text, go = st.columns([4, 1], vertical_alignment="center")
            text.info(t("environment.made", path=str(made)), icon=":material/check_circle:")
            if go.button(t("environment.use_it"), key="environment_use_made", type="primary", width="stretch"):
                choose_python(project, made)
                st.rerun()
        return
    if not phase.is_active and time.time() - (status.ended_at or 0.0) > _KEEP_SHOWING_SECONDS:
        return
    with st.expander(t("environment.creation_log"), icon=":material/terminal:", expanded=phase.is_active):
        st.fragment(_log, run_every=1.0 if phase.is_active else None)(str(log_file(run)))
    if not phase.is_active:
        st.caption(t("environment.goes_on"))


def _log(path: str) -> None:
    tail = read_tail(Path(path))
    show_lines(tail.lines, has_log=bool(tail.lines), height=260)


def _name_of(interpreter: Interpreter) -> str:
    xtuner = f"XTuner {interpreter.xtuner}" if interpreter.xtuner else t("environment.no_xtuner")
    return f"{interpreter.name} · {t(f'environment.sources_{interpreter.source}')} · {xtuner}"


def show_tunnel() -> None:
    user, host, port = this_machine()
    columns = st.columns([2, 3, 1])
    user = columns[0].text_input(
        t("environment.tunnel_user"), user, key="environment_tunnel_user", help=t("environment.tunnel_user_help")
    )
    host = columns[1].text_input(
        t("environment.tunnel_host"), host, key="environment_tunnel_host", help=t("environment.tunnel_host_help")
    )
    port = columns[2].number_input(
        t("environment.tunnel_port"),
        1,
        65535,
        port,
        key="environment_tunnel_port",
        help=t("environment.tunnel_port_help"),
    )
    if not (re.fullmatch(r"[\w.-]+", user) and re.fullmatch(r"[\w.:-]+", host)):
        st.warning(t("environment.tunnel_bad"))
        return
    app_port = int(st.get_option("server.port") or GUIDE_PORT)
    st.code(tunnel_command(user, host, ssh_port=int(port), port=app_port), language="bash", wrap_lines=True)
    st.caption(t("environment.tunnel_help", port=app_port))
