"""Readers of run files that outlive a rerun: each rerun, and each browser tab, reads only what is new."""

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from core.errors import DanluError
from core.files import read_json
from core.gpu import devices
from core.models.inspect import inspect_model
from core.runs.directory import RunDirectory, RunSpec
from core.runs.jobs import Listed, Version, version_of
from core.runs.machine import MachineReader, MachineSeries
from core.runs.metrics import Metrics, MetricsReader, read_work_dir
from core.runs.pace import ask_all
from core.runs.state import RunStatus, read_status
from core.runs.summary import RunSummary, summarize
from core.runs.utilisation import Shape, shape_of


def metrics_of(run: RunDirectory) -> Metrics:
    """All metrics of `run` so far; XTuner's own for a work dir made by hand, and for XTuner 0.1.x, which has no live hooks."""
    if run.metrics_file.exists():
        return _metrics_reader(str(run.metrics_file)).refresh()
    return read_work_dir(run)


def machine_series_of(run: RunDirectory) -> MachineSeries:
    """All samples of GPUs and machine so far."""
    return _machine_reader(str(run.gpu_file)).refresh()


def spec_of(run: RunDirectory) -> RunSpec | None:
    """What run.json says; None for a work dir made by hand, or where it cannot be read."""
    try:
        found = run.spec_file.stat()
    except OSError:
        return None
    return Listed(run, version_of(found)).spec()


def summaries_of(runs: Sequence[Listed]) -> list[RunSummary]:
    """The rows of `runs`; one that has ended is not read again until its files change."""
    found = []
    for listed, (status, versions) in zip(runs, ask_all(_standing, runs), strict=True):
        if status.phase.is_active:
            found.append(summarize(listed.run, metrics_of(listed.run), status))
        else:
            found.append(_summary(str(listed.run.path), (listed.version, *versions), status))
    return found


def _standing(listed: Listed) -> tuple[RunStatus, tuple[Version, ...]]:
    run = listed.run
    status = read_status(run)
    return status, () if status.phase.is_active else (_version(run.metrics_file), _version(run.notes_file))


def _version(file: Path) -> Version:
    try:
        return version_of(file.stat())
    except OSError:
        return ()


@st.cache_data(max_entries=2000, show_spinner=False)
def _summary(path: str, versions: tuple[Version, ...], status: RunStatus) -> RunSummary:
    del versions  # only tell whether it is still true
    run = RunDirectory(Path(path))
    return summarize(run, metrics_of(run), status)


@st.cache_data(ttl=3600, max_entries=16, show_spinner=False)
def model_shape(folder: str) -> Shape | None:
    """Size of the base model in `folder`; None if it is not there any more."""
    try:
        return shape_of(read_json(Path(folder) / "config.json"), inspect_model(Path(folder)).parameters)
    except (DanluError, OSError):
        return None


@st.cache_data(ttl=3600, max_entries=1, show_spinner=False)
def gpu_names() -> dict[str, str]:
    """UUID or index → name of the GPUs of this machine."""
    return {key: gpu.name or "" for gpu in devices() for key in (str(gpu.uuid), str(gpu.index))}


@st.cache_resource(max_entries=32, show_spinner=False)
def _metrics_reader(path: str) -> MetricsReader:
    return MetricsReader(Path(path))


@st.cache_resource(max_entries=8, show_spinner=False)
def _machine_reader(path: str) -> MachineReader:
    return MachineReader(Path(path))
