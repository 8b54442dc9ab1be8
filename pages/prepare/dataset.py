"""Data sets of the project: make or bring in one, look at it, check it, see what training will learn from it."""

from pathlib import Path

import streamlit as st

from core.data import library
from core.data.library import Dataset
from core.errors import DanluError
from pages.ui import shell
from pages.ui.dataset_add import add_forms
from pages.ui.dataset_check import check_view
from pages.ui.dataset_learned import learned_view
from pages.ui.dataset_rows import rows_view
from pages.ui.dataset_versions import versions_view
from pages.ui.jobs import job_panel
from pages.ui.text import gib, show_error, t

VIEWS = {"rows": rows_view, "check": check_view, "learned": learned_view, "versions": versions_view}
JOBS = ("data_check", "data_convert", "data_measure", "data_copy", "data_tokenizer")


def label(dataset: Dataset) -> str:
    rows = t("dataset.rows_short", rows=f"{dataset.rows:,}") if dataset.rows is not None else gib(dataset.size_bytes)
    return f"{dataset.path.relative_to(project.data)} · {rows}"


def choose(datasets: list[Dataset]) -> Dataset:
    """The data set on show; one just added or made is chosen by itself."""
    names = {str(dataset.path.relative_to(project.data)): dataset for dataset in datasets}
    wanted = st.session_state.pop("dataset_next", None) or st.session_state.get("dataset_file")
    st.session_state["dataset_file"] = wanted if wanted in names else next(iter(names))
    labels = {name: label(dataset) for name, dataset in names.items()}
    chosen = st.selectbox(
        t("dataset.file"), names, key="dataset_file", format_func=labels.__getitem__, help=t("dataset.file_help")
    )
    return names[chosen]


def checked(dataset: Dataset) -> Dataset:
    """Small files are checked when they are first shown; large ones on request, in a job."""
    if dataset.report is not None or dataset.problem is not None or dataset.size_bytes > library.INLINE_BYTES:
        return dataset
    with st.spinner(t("data.progress.check")):
        return library.check(project, dataset.path)


def header(dataset: Dataset) -> None:
    """One line of facts: format, rows, what was found, how XTuner reads it."""
    report = dataset.report
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.badge(t(f"data.format.{dataset.format}"), icon=":material/data_object:", color="blue")
        if report is None:
            st.badge(t("dataset.unchecked"), icon=":material/help:", color="gray")
        else:
            if report.errors:
                st.badge(t("dataset.errors", count=f"{report.errors:,}"), icon=":material/error:", color="red")
            if report.warnings:
                st.badge(t("dataset.warnings", count=f"{report.warnings:,}"), icon=":material/warning:", color="orange")
        if dataset.is_trainable:
            ready = t("dataset.ready" if report else "dataset.readable")
            st.badge(ready, icon=":material/check_circle:", color="green")
        reader = t("dataset.map_fn", name=dataset.map_fn) + " · " if dataset.is_trainable else ""
        st.caption(reader + gib(dataset.size_bytes))


project = shell.require_project()
shell.page_header("dataset")
if notice := st.session_state.pop("dataset_notice", None):
    st.toast(notice, icon=":material/check_circle:")
try:
    datasets = library.list_datasets(project)
    if not datasets:
        st.info(t("dataset.empty"), icon=":material/dataset:")
        with st.container(border=True):
            add_forms(project)
    else:
        left, right = st.columns([5, 1], vertical_alignment="bottom")
        with left:
            dataset = choose(datasets)
        is_adding = right.toggle(t("dataset.add"), key="dataset_adding")
        if is_adding:
            with st.container(border=True):
                add_forms(project)
        dataset = checked(dataset)
        header(dataset)
    job_panel(project, JOBS)
    if datasets and dataset.problem is not None:
        show_error(dataset.problem)
    elif datasets:
        view = st.segmented_control(
            t("dataset.view"),
            list(VIEWS),
            default="rows",
            format_func={name: t(f"dataset.views.{name}") for name in VIEWS}.__getitem__,
            key=f"dataset_view_{Path(dataset.name).stem}",
            label_visibility="collapsed",
            required=True,
        )
        VIEWS[view or "rows"](project, dataset)
except DanluError as error:
    show_error(error)
