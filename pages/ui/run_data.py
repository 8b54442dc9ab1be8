"""Readers of run files that outlive a rerun: each rerun, and each browser tab, reads only what is new."""

from pathlib import Path
from typing import Any

import streamlit as st

from core.runs.directory import RunDirectory
from core.runs.metrics import Metrics, MetricsReader, read_work_dir
from core.runs.samples import LineReader


def metrics_of(run: RunDirectory) -> Metrics:
    """All metrics of `run` so far, XTuner's own for a work dir made by hand."""
    if run.metrics_file.exists() or run.spec_file.exists():
        return _metrics_reader(str(run.metrics_file)).refresh()
    return read_work_dir(run)


def machine_samples_of(run: RunDirectory) -> list[dict[str, Any]]:
    """All samples of GPUs and machine so far."""
    return _sample_reader(str(run.gpu_file)).refresh()


@st.cache_resource(max_entries=32, show_spinner=False)
def _metrics_reader(path: str) -> MetricsReader:
    return MetricsReader(Path(path))


@st.cache_resource(max_entries=8, show_spinner=False)
def _sample_reader(path: str) -> LineReader:
    return LineReader(Path(path))
