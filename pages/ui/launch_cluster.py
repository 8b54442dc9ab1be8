"""Where to train, on the launch page: GPUs of this machine, its CPU, several machines, or a Slurm cluster with its batch file."""

import os
from dataclasses import dataclass, replace

import streamlit as st

from core.errors import DanluError
from core.launchers import slurm
from core.launchers.local import list_gpus
from core.launchers.nodes import NodesWish, default_address
from core.launchers.slurm import SlurmWish
from core.project import Project
from core.runs.directory import RunSpec
from pages.ui.code_box import code_box
from pages.ui.text import gib, show_error, t

_TEXT = "launch_batch_text"
_MADE = "launch_batch_made"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the training will run."""

    gpus: tuple[str, ...] = ()
    cpu_processes: int = 1
    slurm: SlurmWish | None = None
    nodes: NodesWish | None = None


def choose_place(project: Project) -> Place:
    """This machine, several, or the cluster where there is one."""
    choices = ["here", "nodes_by_hand", *(["cluster"] if _has_slurm() else [])]
    where = st.segmented_control(
        t("slurm.title"), choices, format_func=lambda name: t(f"slurm.{name}"), default="here", key="launch_where"
    )
    if where == "cluster":
        st.caption(t("slurm.shared", path=str(project.root)))
        return Place(slurm=_choose_cluster())
    if where == "nodes_by_hand":
        st.caption(t("nodes.shared", path=str(project.root)))
        return Place(nodes=_choose_nodes())
    gpus = _choose_gpus()
    return Place(gpus, 1 if gpus else _choose_processes())


def show_batch(spec: RunSpec) -> None:
    """The batch file, editable. An edited text holds until it is made anew."""
    if not spec.details.get("slurm"):
        return
    with st.expander(t("slurm.batch_file"), icon=":material/description:", expanded=True):
        if _MADE not in st.session_state or not _is_edited():
            st.session_state[_MADE] = st.session_state[_TEXT] = spec.details["slurm"]["text"]
        code_box(t("slurm.batch_file"), key=_TEXT, height=320, label_visibility="collapsed")
        if _is_edited():
            st.caption(t("slurm.batch_edited"))
            st.button(t("slurm.batch_reset"), key="launch_batch_reset", on_click=_forget)


def with_edits(wish: SlurmWish | None) -> SlurmWish | None:
    """The wish with the text a person edited, for the start."""
    return replace(wish, text=st.session_state[_TEXT]) if wish and _is_edited() else wish


@st.cache_data(ttl=30, show_spinner=False)
def _has_slurm() -> bool:
    return slurm.is_available()


@st.cache_data(ttl=60, show_spinner=False)
def _partitions() -> list[str]:
    return slurm.partitions()


def _is_edited() -> bool:
    return _MADE in st.session_state and st.session_state.get(_TEXT) != st.session_state[_MADE]


def _forget() -> None:
    st.session_state.pop(_MADE, None)
    st.session_state.pop(_TEXT, None)


def _choose_cluster() -> SlurmWish:
    try:
        names = _partitions()
    except DanluError as error:
        show_error(error)
        st.stop()
    first, second, third, fourth = st.columns(4)
    partition = first.selectbox(t("slurm.partition"), names, key="launch_partition", help=t("slurm.partition_help"))
    account = second.text_input(t("slurm.account"), key="launch_account", help=t("slurm.account_help"))
    nodes = third.number_input(t("slurm.nodes"), 1, 256, 1, key="launch_nodes", help=t("slurm.nodes_help"))
    gpus = fourth.number_input(
        t("slurm.gpus_per_node"), 0, 16, 1, key="launch_gpus_per_node", help=t("slurm.gpus_per_node_help")
    )
    cpus = first.number_input(t("slurm.cpus"), 1, 128, 4, key="launch_cpus", help=t("slurm.cpus_help"))
    minutes = second.number_input(
        t("slurm.minutes"), 1, 60 * 24 * 30, 720, key="launch_minutes", help=t("slurm.minutes_help")
    )
    seconds = third.number_input(t("slurm.signal"), 30, 3600, 300, key="launch_signal", help=t("slurm.signal_help"))
    setup = st.text_area(
        t("slurm.setup"), key="launch_setup", height=80, placeholder="module load cuda/12.4", help=t("slurm.setup_help")
    )
    return SlurmWish(
        partition=partition or "",
        account=account.strip(),
        nodes=int(nodes),
        processes=max(1, int(gpus)),
        has_gpus=gpus > 0,
        cpus_per_process=int(cpus),
        minutes=int(minutes),
        signal_seconds=int(seconds),
        setup=setup,
    )


def _choose_nodes() -> NodesWish:
    cards = len(list_gpus())
    first, second, third, fourth = st.columns([2, 1, 1, 1])
    address = first.text_input(
        t("nodes.address"), _default_address(), key="launch_address", help=t("nodes.address_help")
    )
    count = second.number_input(t("nodes.count"), 2, 64, 2, key="launch_node_count", help=t("nodes.count_help"))
    gpus = third.number_input(
        t("nodes.gpus_per_node"), 0, 16, cards, key="launch_node_gpus", help=t("nodes.gpus_per_node_help")
    )
    port = fourth.number_input(t("nodes.port"), 1024, 65534, 29500, key="launch_port", help=t("nodes.port_help"))
    interface = st.text_input(
        t("nodes.interface"), key="launch_interface", placeholder="eth0", help=t("nodes.interface_help")
    )
    try:
        return NodesWish(
            address=address.strip(),
            port=int(port),
            nodes=int(count),
            processes=max(1, int(gpus)),
            has_gpus=gpus > 0,
            interface=interface.strip(),
        )
    except DanluError as error:
        show_error(error)
        st.stop()


@st.cache_data(show_spinner=False)
def _default_address() -> str:
    return default_address()


def _choose_gpus() -> tuple[str, ...]:
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


def _choose_processes() -> int:
    most = os.cpu_count() or 1
    if most == 1:
        return 1
    return int(
        st.number_input(
            t("launch.processes"), 1, most, 1, key="launch_processes", help=t("launch.processes_help"), width=240
        )
    )
