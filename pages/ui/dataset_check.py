"""What validation found in a data set, with places and examples, and the conversion to a clean copy."""

import streamlit as st

from core.data import library
from core.data.convert import convert
from core.data.findings import Finding, Remedy, Report, Severity
from core.data.formats import Columns, Detection, Format
from core.data.library import Dataset
from core.messages import Message
from core.project import Project
from core.runs.launch import start_job
from pages.ui.audit import note
from pages.ui.dataset_add import attempt
from pages.ui.text import say, t, words

_ICONS = {
    Severity.ERROR: ":red[:material/error:]",
    Severity.WARNING: ":orange[:material/warning:]",
    Severity.INFO: ":blue[:material/info:]",
}
_PARTS = {
    Format.PAIR: ("prompt", "response", "system"),
    Format.ALPACA: ("prompt", "context", "response", "system"),
    Format.MESSAGES: ("turns", "system"),
    Format.SHAREGPT: ("turns", "system"),
    Format.CONVERSATION: ("turns",),
    Format.TEXT: ("text",),
}
_OPTIONAL = ("system", "context")


def check_view(project: Project, dataset: Dataset) -> None:
    report = dataset.report
    if report is None:
        st.info(t("dataset.large_file"), icon=":material/hourglass:")
        if st.button(t("dataset.check_go"), type="primary", key="dataset_check_go"):
            _start(project, dataset, "core.data.library:check_job", "data_check", {"path": str(dataset.path)})
        return
    _summary(dataset, report)
    for finding in report.findings:
        _finding(finding)
    if report.findings:
        st.download_button(
            t("dataset.download_findings"),
            lambda: library.findings_csv(report, words()).encode("utf-8-sig"),
            file_name=f"{dataset.path.stem}_findings.csv",
            mime="text/csv",
            icon=":material/download:",
            key="dataset_download_findings",
        )
    if dataset.format is not Format.UNKNOWN and (report.is_mendable or not dataset.is_trainable):
        _convert_form(project, dataset, report)
    with st.expander(t("dataset.columns"), icon=":material/view_column:", expanded=not dataset.detection.is_sure):
        _columns_form(project, dataset)


def _summary(dataset: Dataset, report: Report) -> None:
    cells = st.columns(4)
    cells[0].metric(t("dataset.rows"), f"{report.rows:,}")
    cells[1].metric(t("dataset.good_rows"), f"{report.good_rows:,}")
    cells[2].metric(t("dataset.error_count"), f"{report.errors:,}")
    cells[3].metric(t("dataset.warning_count"), f"{report.warnings:,}")
    if not report.findings:
        st.success(t("dataset.clean"), icon=":material/check_circle:")
    elif dataset.is_trainable:
        st.success(t("dataset.usable"), icon=":material/check_circle:")


def _finding(finding: Finding) -> None:
    title = f"{_ICONS[finding.severity]} **{_plain(say(finding.message))}** · {t('dataset.times', count=f'{finding.count:,}')}"
    with st.expander(title):
        shown = ", ".join(str(line) for line in finding.lines[:20])
        st.markdown(t("dataset.at_lines", lines=shown + (" …" if finding.count > 20 else "")))
        for example in finding.examples:
            st.caption(
                t(
                    "dataset.example",
                    line=example.line,
                    what=_plain(say(Message(f"data.found.{finding.code}", example.params))),
                )
            )
            if example.excerpt:
                st.code(example.excerpt, language="json", wrap_lines=True)
        icon = ":material/build:" if finding.remedy is not Remedy.NONE else ":material/person:"
        st.markdown(f"{icon} {say(finding.remedy_message)}")


def _convert_form(project: Project, dataset: Dataset, report: Report) -> None:
    with st.container(border=True):
        st.markdown(f"**{t('dataset.convert')}**")
        st.caption(t("dataset.convert_intro", name=f"{dataset.path.stem}.jsonl"))
        has_duplicates = any(finding.code == "duplicate_row" for finding in report.findings)
        keep = (
            ["duplicate_row"]
            if has_duplicates and st.checkbox(t("dataset.keep_duplicates"), key="dataset_keep")
            else []
        )
        if st.button(
            t("dataset.convert_go"), type="primary", icon=":material/auto_fix_high:", key="dataset_convert_go"
        ):
            if dataset.size_bytes <= library.INLINE_BYTES:
                with st.spinner(t("data.progress.convert")):
                    attempt(lambda: convert(project, dataset.path, detection=report.detection, keep=keep).path, project)
            else:
                more = {"source": str(dataset.path), "detection": report.detection.to_json(), "keep": keep}
                _start(project, dataset, "core.data.convert:convert_job", "data_convert", more)


def _columns_form(project: Project, dataset: Dataset) -> None:
    st.caption(t("dataset.columns_intro"))
    detection = dataset.detection
    formats = list(_PARTS)
    index = formats.index(detection.format) if detection.format in formats else 0
    chosen = st.selectbox(
        t("dataset.format"),
        formats,
        index=index,
        format_func={kind: t(f"data.format.{kind}") for kind in formats}.__getitem__,
        key="dataset_format",
        help=t("dataset.format_help"),
    )
    known = detection.columns.to_json()
    nothing = t("dataset.no_column")
    parts: dict[str, str | None] = {}
    cells = st.columns(len(_PARTS[chosen]))
    for cell, part in zip(cells, _PARTS[chosen], strict=True):
        names = ([None] if part in _OPTIONAL else []) + list(detection.names)
        at = names.index(known.get(part)) if known.get(part) in names else 0
        parts[part] = cell.selectbox(
            t(f"dataset.parts.{part}"),
            names,
            index=at if names else None,
            format_func=lambda name: nothing if name is None else name,
            key=f"dataset_part_{dataset.name}_{chosen}_{part}",
            help=t("dataset.parts_named_help"),
        )
    if st.button(t("dataset.columns_go"), disabled=not detection.names, key="dataset_columns_go"):
        by_hand = Detection(chosen, 1.0, Columns.from_json(parts), detection.names)
        if dataset.size_bytes <= library.INLINE_BYTES:
            library.check(project, dataset.path, by_hand)
            st.rerun()
        _start(
            project,
            dataset,
            "core.data.library:check_job",
            "data_check",
            {"path": str(dataset.path), "detection": by_hand.to_json()},
        )


def _start(project: Project, dataset: Dataset, function: str, kind: str, arguments: dict[str, object]) -> None:
    start_job(project, function, kind=kind, title=dataset.name, arguments={"project": str(project.root), **arguments})
    note("start", f"{kind} {dataset.name}")
    st.rerun()


def _plain(text: str) -> str:
    """Text that may quote data, with its markdown marks escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>$~#|:" else letter for letter in text)
