"""Progress of the jobs of a project: what runs, how far it is, a cancel button, and how the last ones ended."""

import time
from collections.abc import Sequence
from typing import Any

import streamlit as st

from core.errors import DanluError, InputError
from core.files import read_json
from core.messages import Message
from core.project import Project
from core.runs.control import request_stop
from core.runs.directory import RunDirectory, RunSpec
from core.runs.jobs import list_jobs
from core.runs.state import Phase, RunStatus, read_status
from pages.ui.audit import note
from pages.ui.text import duration, gib, say, show_error, t

_KEEP_SHOWING_SECONDS = 3600.0


def job_panel(project: Project, kinds: Sequence[str]) -> None:
    """Active jobs of these kinds with progress and cancel, and the last one that ended. Refreshes itself while one is active."""
    key = "jobs_active_" + "_".join(kinds)
    active = [run.id for run in list_jobs(project, kinds) if read_status(run).phase.is_active]
    st.session_state[key] = active
    st.fragment(_panel, run_every=1.0 if active else None)(project, tuple(kinds), key)


def _panel(project: Project, kinds: tuple[str, ...], key: str) -> None:
    shown_end = False
    still_active = []
    for run in list_jobs(project, kinds):
        status = read_status(run)
        if status.phase.is_active:
            still_active.append(run.id)
            _active_job(run, run.spec(), status)
        elif not shown_end and time.time() - (status.ended_at or 0) < _KEEP_SHOWING_SECONDS:
            shown_end = True
            _ended_job(run, run.spec(), status)
    if set(st.session_state.get(key, [])) - set(still_active):
        st.rerun()


def _active_job(run: RunDirectory, spec: RunSpec, status: RunStatus) -> None:
    with st.container(border=True):
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.markdown(f"**{t(f'runs.kinds.{spec.kind}')}** · {spec.title}")
        if right.button(
            t("runs.cancel"), key=f"job_cancel_{run.id}", disabled=status.phase is Phase.STOPPING, width="stretch"
        ):
            request_stop(run, "cancel")
            note("cancel", run.id)
        progress = _progress(run)
        if progress is None:
            st.progress(0.0, text=t(f"runs.phases.{status.phase}"))
        else:
            st.progress(progress["fraction"], text=progress["text"])


def _ended_job(run: RunDirectory, spec: RunSpec, status: RunStatus) -> None:
    title = f"{t(f'runs.kinds.{spec.kind}')} · {spec.title}"
    if status.phase is Phase.FINISHED:
        seconds = (status.ended_at or 0.0) - (status.started_at or 0.0)
        st.success(
            f"{title} — {t('runs.done_in', duration=duration(max(seconds, 0.0)))}", icon=":material/check_circle:"
        )
    elif status.phase in (Phase.CANCELLED, Phase.STOPPED):
        st.info(f"{title} — {t(f'runs.phases.{status.phase}')}", icon=":material/cancel:")
    elif run.error_file.exists():
        st.markdown(f"**{title}**")
        show_error(_error(run))
    else:
        st.error(f"{title} — {t('runs.job_broke', path=str(run.log_file))}", icon=":material/error:")


def _error(run: RunDirectory) -> DanluError:
    """What the job says of its end; if that cannot be read, that."""
    try:
        return DanluError.from_json(read_json(run.error_file))
    except DanluError as error:
        return error
    except (KeyError, TypeError, ValueError) as error:
        return InputError("files.broken_schema", path=str(run.error_file), reason=str(error))


def _progress(run: RunDirectory) -> dict[str, Any] | None:
    """Fraction done and one line of words, or None before the first report."""
    try:
        value = read_json(run.progress_file)
    except DanluError:
        return None
    done, total, unit = value["done"], value["total"], value["unit"]
    parts = [say(Message.from_json(value["message"]))]
    fraction = min(max(done / total, 0.0), 1.0) if total else 0.0
    elapsed = time.time() - value["started_at"]
    moved = done - value.get("first_done", 0)
    if unit == "bytes":
        parts.append(f"{gib(done)} / {gib(total)}" if total else gib(done))
        parts.append(f"{gib(max(moved, 0) / max(elapsed, 0.1))}/s")
    elif total and total > 1:
        parts.append(f"{done:,.0f} / {total:,.0f} {t(f'runs.units.{unit}') if unit else ''}".strip())
    if total and moved > 0.05 * (total - value.get("first_done", 0)) and fraction < 1.0 and elapsed > 3.0:
        parts.append(t("runs.time_left", duration=duration(elapsed * (total - done) / moved)))
    return {"fraction": fraction, "text": " · ".join(parts)}
