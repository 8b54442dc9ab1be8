"""Where a run trains that is not on this machine alone, on the monitor: its Slurm job, or its nodes and what to paste on them."""

from typing import Any

import streamlit as st

from core.errors import DanluError
from core.files import read_json
from core.launchers.nodes import NodeReport, paste_command, read_nodes
from core.launchers.slurm import JOB_FILE
from core.runs.directory import RunDirectory, RunSpec
from core.runs.state import RunStatus
from pages.ui.text import t, words


def cluster_note(run: RunDirectory, status: RunStatus) -> None:
    """The Slurm job of `run`, or its nodes; nothing for a run on this machine alone."""
    if (run.path / JOB_FILE).exists():
        _job(run)
    elif run.spec_file.exists():
        try:
            spec = run.spec()
        except DanluError:
            return
        if spec.details.get("nodes"):
            _nodes(run, spec, status)


def _job(run: RunDirectory) -> None:
    try:
        job = read_json(run.path / JOB_FILE)
    except DanluError:
        return
    st.caption(":material/dns: " + " · ".join(_parts(job)))


def _nodes(run: RunDirectory, spec: RunSpec, status: RunStatus) -> None:
    """Every node's state; while some are missing, what to paste there."""
    count = int(spec.details["nodes"]["nodes"])
    reports = {report.rank: report for report in read_nodes(run)}
    st.caption(":material/dns: " + " · ".join(_node(rank, reports.get(rank)) for rank in range(count)))
    missing = [rank for rank in range(1, count) if rank not in reports]
    if missing and status.phase.is_active:
        st.markdown(t("nodes.paste"))
        for rank in missing:
            with st.expander(
                t("nodes.command", rank=rank), icon=":material/content_copy:", expanded=rank == missing[0]
            ):
                st.code(paste_command(spec, run.path, rank), language="bash", wrap_lines=True)


def _node(rank: int, report: NodeReport | None) -> str:
    name = report.host if report else t("nodes.command", rank=rank)
    return f"{name}: {t('nodes.states.' + (report.state if report else 'missing'))}"


def _parts(job: dict[str, Any]) -> list[str]:
    parts = [t("slurm.job", id=job["id"]), _word("states", job["state"])]
    if job.get("is_pending"):
        parts += [t("slurm.place", position=job["position"])] if job.get("position") else []
        parts += [_word("reasons", job["reason"])] if job.get("reason") else []
        parts += [t("slurm.starts", at=job["starts_at"].replace("T", " "))] if job.get("starts_at") else []
    parts += [t("slurm.on_nodes", nodes=job["nodes"])] if job.get("nodes") else []
    parts += [t("slurm.restarts", count=job["restarts"])] if job.get("restarts") else []
    return parts


def _word(kind: str, name: str) -> str:
    """Slurm's own word where we have none: there are more than a hundred."""
    key = f"slurm.{kind}.{name}"
    return t(key) if key in words().sentences else name
