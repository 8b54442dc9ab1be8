"""What became of the speed layer in a run: which parts are in use and how, and why the others are not."""

import streamlit as st

from core.config.library import read_config
from core.config.source import ConfigSource
from core.errors import DanluError
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.speed_table import Gain, measured_gain
from core.runs.state import RunStatus
from core.xtuner.runtime.speed.parts import PartReport, read_reports
from pages.ui.run_data import spec_of
from pages.ui.text import say, t


def run_speed(project: Project, run: RunDirectory, status: RunStatus) -> None:
    """Nothing for a run that was not started by the app: it has no speed layer."""
    spec = spec_of(run)
    if spec is None or "config" not in spec.details:
        return
    wish = spec.details.get("speed", "off")
    reports = read_reports(run.path)
    if reports:
        count = sum(report.applied for report in reports)
        label = t("speed.run_all", count=count, total=len(reports))
    elif wish == "off":
        label = t("speed.run_off")
    elif status.phase.is_active:
        label = t("speed.run_waiting")
    else:
        return
    if not reports:
        st.caption(f":material/bolt: {label}")
        return
    gain = _gain(project, run, spec)
    if gain:
        label += t("speed.run_gain", gain=f"{gain.fast / gain.stock:.1f}")
    with st.expander(f"{t('speed.run_title')} · {label}", icon=":material/bolt:"):
        st.markdown(_table(reports, gain))
        if gain:
            rates = {"stock": f"{gain.stock:,.0f}", "fast": f"{gain.fast:,.0f}", "at": gain.at}
            st.caption(t("speed.run_measured", **rates))


def _table(reports: list[PartReport], gain: Gain | None) -> str:
    """With the gain of a part where it was measured alone."""
    lines = [f"| | {t('speed.part')} | {t('speed.effect')} |", "|---|---|---|"]
    for report in sorted(reports, key=lambda report: not report.applied):
        badge = ":green[:material/check:]" if report.applied else ":gray[:material/remove:]"
        note = say(report.note).replace("|", "\\|")
        if report.applied and gain and report.name in gain.parts:
            note += f" **× {gain.parts[report.name]:.2f}**"
        lines.append(f"| {badge} | {t(f'speed.parts.{report.name}')} | {note} |")
    return "\n".join(lines)


def _gain(project: Project, run: RunDirectory, spec: RunSpec) -> Gain | None:
    """What was measured for this config, this wish and this card; None where nothing was."""
    details, file = spec.details, run.source / f"{spec.details['config']['name']}.py"
    if details.get("speed") in (None, "off") or details.get("world_size") != 1 or details.get("deepspeed"):
        return None
    try:
        source = ConfigSource(read_config(file))
        return measured_gain(project, source, details["speed"], gpu=spec.gpus[0] if spec.gpus else None)
    except (DanluError, OSError):
        return None
