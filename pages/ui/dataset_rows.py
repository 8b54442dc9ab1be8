"""Rows of a data set: a searchable table, one row as a chat, and editing a row into a new version."""

import json
from typing import Any

import streamlit as st

from core.data import library, split
from core.data.library import Dataset
from core.data.reader import Row
from core.data.rows import parse_row
from core.project import Project
from pages.ui.dataset_add import attempt
from pages.ui.text import t

_PAGE_ROWS = 8
_CELL = 200
_AVATARS = {"system": ":material/settings:", "user": ":material/person:", "assistant": ":material/smart_toy:"}


def rows_view(project: Project, dataset: Dataset) -> None:
    left, right = st.columns([5, 1], vertical_alignment="bottom")
    query = left.text_input(
        t("dataset.search"), key="dataset_query", placeholder=t("dataset.search_example"), label_visibility="collapsed"
    )
    number = right.number_input(t("dataset.page"), 1, None, 1, key="dataset_page", label_visibility="collapsed")
    page = library.browse(dataset.path, offset=(int(number) - 1) * _PAGE_ROWS, count=_PAGE_ROWS, query=query)
    if not page.rows:
        st.info(t("dataset.no_rows_found"), icon=":material/search_off:")
        return
    table = [{t("dataset.line"): row.line} | _cells(dataset, row) for row in page.rows]
    narrow = {t("dataset.line"): st.column_config.NumberColumn(width="small")}
    st.dataframe(table, hide_index=True, width="stretch", column_config=narrow)
    st.caption(t("dataset.more_rows" if page.has_more else "dataset.last_rows", page=int(number)))
    lines = {row.line: row for row in page.rows}
    chosen = st.pills(
        t("dataset.show_line"),
        list(lines),
        default=page.rows[0].line,
        key=f"dataset_line_{number}_{query}",
        required=True,
    )
    _row_view(project, dataset, lines.get(chosen or page.rows[0].line, page.rows[0]))


def _cells(dataset: Dataset, row: Row) -> dict[str, str]:
    """Question and answer of a row for the table; the raw row if it cannot be taken apart."""
    parsed = parse_row(row.value, dataset.format, dataset.detection.columns)
    if not dataset.format.is_chat:
        return {t("dataset.text"): (_json(row.value) if parsed.text is None else parsed.text)[: 2 * _CELL]}
    asked = next((one["content"] for one in parsed.messages if one["role"] == "user"), _json(row.value))
    said = next((one["content"] for one in parsed.messages if one["role"] == "assistant"), "")
    return {t("dataset.question"): asked[:_CELL], t("dataset.answer"): said[:_CELL]}


def _row_view(project: Project, dataset: Dataset, row: Row) -> None:
    parsed = parse_row(row.value, dataset.format, dataset.detection.columns)
    for message in parsed.messages:
        with st.chat_message(message["role"], avatar=_AVATARS[message["role"]]):
            st.text(message["content"])
    if parsed.text is not None:
        st.text(parsed.text[:4000])
    if not parsed.messages and parsed.text is None:
        st.code(_json(row.value, indent=2)[:4000], language="json")
    with st.expander(t("dataset.edit"), icon=":material/edit:"), st.form(f"dataset_edit_{row.line}", border=False):
        text = st.text_area(
            "JSON",
            _json(row.value, indent=2),
            height=220,
            label_visibility="collapsed",
            key=f"dataset_edit_{dataset.name}_{row.line}",
        )
        if st.form_submit_button(t("dataset.edit_go"), help=t("dataset.edit_help")):
            attempt(lambda: split.replace_row(project, dataset.path, row.line, text), project)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str).encode("utf-8", "replace").decode()
