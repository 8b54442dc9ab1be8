"""Launch: choose config, device, DeepSpeed and a checkpoint to go on from; see what is wrong and the exact command; start."""

from pathlib import Path

import streamlit as st

from core.config.library import list_configs, read_config
from core.config.source import ConfigSource
from core.errors import DanluError
from core.launchers.local import list_gpus
from core.runs.jobs import active_runs
from core.runs.train import TrainRequest, plan, resumable, start_training
from core.xtuner.command import DEEPSPEED_CHOICES
from pages.ui import shell
from pages.ui.launch_views import facts, show_checks, show_command
from pages.ui.text import gib, show_error, t


def choose_config() -> Path:
    configs = {config.name: config.path for config in list_configs(project)}
    if not configs:
        shell.missing(t("launch.no_config"), "config")
        st.stop()
    return configs[st.selectbox(t("launch.config"), configs, key="launch_config")]


def choose_device() -> tuple[str, ...]:
    gpus = {gpu.uuid: gpu for gpu in list_gpus()}
    if not gpus:
        st.info(t("launch.cpu_only"), icon=":material/memory:")
        return ()
    chosen = st.multiselect(
        t("launch.gpus"),
        gpus,
        default=next(iter(gpus)),
        key="launch_gpus",
        format_func=lambda uuid: t(
            "launch.gpu",
            index=gpus[uuid].index,
            name=gpus[uuid].name,
            free=gib(gpus[uuid].memory_bytes - gpus[uuid].used_bytes),
            total=gib(gpus[uuid].memory_bytes),
        ),
        help=t("launch.gpus_help"),
    )
    return tuple(chosen)


def choose_resume() -> tuple[Path | None, str | None]:
    """The checkpoint to go on from, and the DeepSpeed choice it was saved with."""
    if not st.toggle(t("launch.resume"), key="launch_resume", help=t("launch.resume_help")):
        return None, None
    cards = {str(card.path): card for card in resumable(project)}
    if not cards:
        st.caption(t("launch.no_checkpoint"))
        return None, None
    picked = st.selectbox(
        t("launch.checkpoint"),
        cards,
        key="launch_checkpoint",
        format_func=lambda path: str(Path(path).relative_to(project.train)),
    )
    card = cards[picked]
    return card.path, f"deepspeed_zero{card.stage or 2}" if card.is_folder else None


def choose() -> TrainRequest:
    config = choose_config()
    facts(ConfigSource(read_config(config)))
    gpus = choose_device()
    resume, saved_with = choose_resume()
    choices = ["none", *DEEPSPEED_CHOICES]
    with st.container(horizontal=True):
        preset = choices.index(saved_with or "none")
        deepspeed = st.selectbox(
            t("launch.deepspeed"),
            choices,
            index=preset,
            key=f"launch_deepspeed_{preset}",
            format_func=lambda name: t(f"launch.zero.{name}"),
        )
        seed = st.number_input(t("launch.seed"), 0, 2**31 - 1, 42, key="launch_seed", disabled=resume is not None)
        name = st.text_input(t("launch.name"), key="launch_name", placeholder=t("launch.name_hint"))
    st.caption(t(f"launch.zero_help.{deepspeed}"))
    python = shell.settings().python
    return TrainRequest(
        config=config,
        gpus=gpus,
        deepspeed=None if deepspeed == "none" else deepspeed,
        resume=resume,
        seed=int(seed),
        name=name.strip(),
        **({"python": str(python)} if python else {}),
    )


def main() -> None:
    request = choose()
    st.subheader(t("launch.checks"), divider="gray")
    try:
        is_ready = show_checks(project, request)
        spec = plan(project, request)
    except DanluError as error:
        show_error(error)
        return
    show_command(spec)
    if running := active_runs(project):
        st.warning(t("launch.running", names=", ".join(run.id for run in running)), icon=":material/hourglass:")
    if st.button(
        t("launch.start"), type="primary", icon=":material/rocket_launch:", key="launch_start", disabled=not is_ready
    ):
        run = start_training(project, request)
        st.session_state["monitor_run"] = run.id
        st.switch_page(shell.PAGES["monitor"], query_params={"run": run.id})


project = shell.require_project()
shell.page_header("launch")
try:
    main()
except DanluError as problem:
    show_error(problem)
