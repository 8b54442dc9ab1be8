"""Launch: choose config, device, DeepSpeed and a checkpoint to go on from; see what is wrong and the exact command; start."""

import sys

import streamlit as st

from core.config.findings import Severity
from core.environment.interpreters import is_legacy, training_python, xtuner_version
from core.errors import DanluError
from core.runs.jobs import active_of, look_at_runs
from core.runs.request import TrainRequest
from core.runs.resume import Mode
from core.runs.start import read_start
from core.runs.train import is_written_anew, plan, start_training
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.launch_bar import Bar, draw_bar, fill_bar, show_trouble, start_button
from pages.ui.launch_cluster import choose_place, show_batch, with_edits
from pages.ui.launch_deepspeed import choose_deepspeed, edit_deepspeed
from pages.ui.launch_memory import memory_panel
from pages.ui.launch_resume import choose_resume, remember_job, show_job, show_plan
from pages.ui.launch_speed import speed_choice
from pages.ui.launch_time import time_panel
from pages.ui.launch_views import show_checks, show_command
from pages.ui.text import show_error, t

TABS = ("place", "checks", "budget", "parallel", "speed", "command")


def choose(bar: Bar) -> TrainRequest:
    with tabs["place"]:
        place = choose_place(project)
        resume = choose_resume(project, [listed.run for listed in runs])
        is_same_curve = resume.checkpoint is not None and resume.mode is Mode.EXACT
        seed = st.number_input(
            t("launch.seed"),
            0,
            2**31 - 1,
            42,
            key="launch_seed",
            disabled=is_same_curve,
            width=240,
            help=t("launch.seed_help"),
        )
        python = training_python(project, shell.settings().python)
        if is_legacy(python):
            st.info(t("launch.legacy", version=xtuner_version(python), python=python), icon=":material/history:")
        elif str(python) != sys.executable:
            st.caption(t("launch.python", python=python))
    with tabs["parallel"]:
        deepspeed = choose_deepspeed(project, resume)
    with tabs["speed"]:
        speed = speed_choice(project, bar.config, place.gpus, is_busy=bool(active))
    return TrainRequest(
        config=bar.config,
        gpus=place.gpus,
        deepspeed=deepspeed,
        cpu_processes=place.cpu_processes,
        slurm=with_edits(place.slurm),
        nodes=place.nodes,
        resume=resume.checkpoint,
        resume_mode=resume.mode,
        extra_epochs=resume.extra_epochs,
        seed=None if is_same_curve else int(seed),
        name=bar.name,
        speed=speed,
        python=str(python),
    )


def start(request: TrainRequest, *, is_prepared_first: bool) -> None:
    run = start_training(project, request)
    note("start", run.id)
    if is_prepared_first:
        remember_job(run)
    st.session_state["monitor_run"] = run.id
    st.switch_page(shell.PAGES["monitor"], query_params={"run": run.id})


def main(bar: Bar) -> None:
    request = choose(bar)
    read = read_start(project, request)
    with tabs["parallel"]:
        is_saved = edit_deepspeed(project, read)
    with tabs["checks"]:
        findings = show_checks(project, read)
    with tabs["budget"]:
        memory = memory_panel(project, read)
        time = time_panel(project, read, runs)
    fill_bar(bar, active, findings, time, memory, None if is_saved else f":orange-badge[{t('launch.bar.unsaved')}]")
    try:
        spec = plan(project, request, read)
    except DanluError as error:
        show_trouble(bar, error, findings)
        start_button(bar, can_start=False)
        return
    with tabs["place"]:
        show_plan(spec)
    with tabs["command"]:
        show_batch(spec)
        show_command(spec)
    is_ready = is_saved and all(finding.severity is not Severity.ERROR for finding in findings)
    if start_button(bar, can_start=is_ready):
        start(request, is_prepared_first=is_written_anew(spec))


project = shell.require_project()
shell.page_header("launch")
show_job(project)
runs = look_at_runs(project)
active = active_of([listed.run for listed in runs])
try:
    top = draw_bar(project)
    tabs = dict(zip(TABS, st.tabs([t(f"launch.tabs.{name}") for name in TABS]), strict=True))
    main(top)
except DanluError as problem:
    show_error(problem)
    st.page_link(shell.PAGES["config"], label=t("launch.mend"), icon=shell.ICONS["config"])
