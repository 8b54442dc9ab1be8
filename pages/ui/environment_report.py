"""What the doctor found, what is wrong on top, and the machine as it is now."""

import os
import shutil
from datetime import datetime
from pathlib import Path

import psutil
import streamlit as st

from core.environment.report import Line, Report, Status
from core.gpu import GpuSnapshot, devices
from pages.ui.text import gib, say, t

_ICONS = {
    Status.GREEN: ":green[:material/check_circle:]",
    Status.AMBER: ":orange[:material/warning:]",
    Status.RED: ":red[:material/error:]",
}


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


def _show_line(line: Line) -> None:
    st.markdown(f"{_ICONS[line.status]} **{line.name}** · {say(line.message)}")
    if line.fix and line.status is not Status.GREEN:
        st.code(line.fix, language="bash", wrap_lines=True)


def show_report(report: Report) -> None:
    """What is wrong stands open, the whole list is one click away."""
    for line in report.lines:
        if line.status is not Status.GREEN:
            _show_line(line)
    with st.expander(t("environment.show_all", count=len(report.lines)), icon=":material/list:"):
        for column, groups in zip(st.columns(2), (("packages",), ("python", "gpu", "machine")), strict=True):
            for group in groups:
                column.caption(t(f"environment.groups_{group}"))
                for line in (line for line in report.lines if line.group == group):
                    column.markdown(f"{_ICONS[line.status]} **{line.name}** · {say(line.message)}")


def _show_gpu(gpu: GpuSnapshot) -> None:
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
                _show_gpu(gpu)
    ram, disk, cores = st.columns(3)
    memory = psutil.virtual_memory()
    ram.metric(t("environment.ram"), gib(memory.available), border=True)
    disk.metric(t("environment.disk"), gib(shutil.disk_usage(root).free), border=True)
    cores.metric(t("environment.cores"), os.cpu_count() or "–", border=True)
