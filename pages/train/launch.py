"""Launch: choose config, device, DeepSpeed and a checkpoint to go on from; see what is wrong and the exact command; start."""

import sys
from pathlib import Path

import streamlit as st

from core.config.library import list_configs, read_config
from core.config.source import ConfigSource
from core.environment.interpreters import is_legacy, training_python, xtuner_version
from core.errors import DanluError
from core.runs.jobs import active_runs
from core.runs.resume import Mode
from core.runs.train import TrainRequest, is_written_anew, plan, start_training
from core.xtuner.command import DEEPSPEED_CHOICES
from pages.ui import shell
from pages.ui.launch_cluster import choose_place, show_batch, with_edits
from pages.ui.launch_memory import memory_panel
from pages.ui.launch_resume import choose_resume, remember_job, show_job, show_plan
from pages.ui.launch_speed import speed_choice
from pages.ui.launch_time import time_panel
from pages.ui.launch_views import facts, show_checks, show_command
from pages.ui.text import show_error, t


def choose_config() -> Path:
    configs = {config.name: config.path for config in list_configs(project)}
    if not configs:
        shell.missing(t("launch.no_config"), "config")
        st.stop()
    return configs[st.selectbox(t("launch.config"), configs, key="launch_config")]


def choose() -> TrainRequest:
    config = choose_config()
    facts(ConfigSource(read_config(config)))
    place = choose_place(project)
    resume = choose_resume(project)
    choices = ["none", *DEEPSPEED_CHOICES]
    with st.container(horizontal=True):
        preset = choices.index(resume.deepspeed or "none")
        deepspeed = st.selectbox(
            t("launch.deepspeed"),
            choices,
            index=preset,
            key=f"launch_deepspeed_{preset}",
            format_func=lambda name: t(f"launch.zero.{name}"),
        )
        is_same_curve = resume.checkpoint is not None and resume.mode is Mode.EXACT
        seed = st.number_input(t("launch.seed"), 0, 2**31 - 1, 42, key="launch_seed", disabled=is_same_curve)
        name = st.text_input(t("launch.name"), key="launch_name", placeholder=t("launch.name_hint"))
    st.caption(t(f"launch.zero_help.{deepspeed}"))
    speed = speed_choice(project, config, place.gpus)
    python = training_python(project, shell.settings().python)
    if is_legacy(python):
        st.info(t("launch.legacy", version=xtuner_version(python), python=python), icon=":material/history:")
    elif python != Path(sys.executable):
        st.caption(t("launch.python", python=python))
    return TrainRequest(
        config=config,
        gpus=place.gpus,
        deepspeed=None if deepspeed == "none" else deepspeed,
        cpu_processes=place.cpu_processes,
        slurm=with_edits(place.slurm),
        nodes=place.nodes,
        resume=resume.checkpoint,
        resume_mode=resume.mode,
        extra_epochs=resume.extra_epochs,
        seed=None if is_same_curve else int(seed),
        name=name.strip(),
        speed=speed,
        python=str(python),
    )


def main() -> None:
    request = choose()
    st.subheader(t("launch.checks"), divider="gray")
    try:
        is_ready = show_checks(project, request)
        memory_panel(project, request)
        time_panel(project, request)
        spec = plan(project, request)
    except DanluError as error:
        show_error(error)
        return
    show_plan(spec)
    show_batch(spec)
    show_command(spec)
    if running := active_runs(project):
        st.warning(t("launch.running", names=", ".join(run.id for run in running)), icon=":material/hourglass:")
    if st.button(
        t("launch.start"), type="primary", icon=":material/rocket_launch:", key="launch_start", disabled=not is_ready
    ):
        run = start_training(project, request)
        if is_written_anew(spec):
            remember_job(run)
        st.session_state["monitor_run"] = run.id
        st.switch_page(shell.PAGES["monitor"], query_params={"run": run.id})


project = shell.require_project()
shell.page_header("launch")
show_job(project)
try:
    main()
except DanluError as problem:
    show_error(problem)
    st.page_link(shell.PAGES["config"], label=t("launch.mend"), icon=shell.ICONS["config"])
