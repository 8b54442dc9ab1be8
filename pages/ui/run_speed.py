"""What became of the speed layer in a run: which parts are in use and how, and why the others are not."""

import streamlit as st

from core.errors import DanluError
from core.runs.directory import RunDirectory
from core.runs.state import RunStatus
from core.xtuner.runtime.speed.parts import PartReport, read_reports
from pages.ui.text import say, t


def run_speed(run: RunDirectory, status: RunStatus) -> None:
    """Nothing for a run that was not started by the app: it has no speed layer."""
    wish = _wish(run)
    if wish is None:
        return
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
    with st.expander(f"{t('speed.run_title')} · {label}", icon=":material/bolt:"):
        st.markdown(_table(reports))


def _table(reports: list[PartReport]) -> str:
    lines = [f"| | {t('speed.part')} | {t('speed.effect')} |", "|---|---|---|"]
    for report in sorted(reports, key=lambda report: not report.applied):
        badge = ":green[:material/check:]" if report.applied else ":gray[:material/remove:]"
        note = say(report.note).replace("|", "\\|")
        lines.append(f"| {badge} | {t(f'speed.parts.{report.name}')} | {note} |")
    return "\n".join(lines)


def _wish(run: RunDirectory) -> object | None:
    if not run.spec_file.exists():
        return None
    try:
        details = run.spec().details
    except DanluError:
        return None
    return details.get("speed", "off") if "config" in details else None
