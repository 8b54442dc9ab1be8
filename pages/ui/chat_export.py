"""Answers as training samples: which rows, onto which data set, under which name, and what will be written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from core.chat.comparison import Comparison
from core.chat.conversation import Conversation
from core.chat.samples import answer_rows, answers_of, best_rows, conversation_row
from core.data.library import INLINE_BYTES, list_datasets
from core.data.mix import append
from core.errors import DanluError
from core.project import Project
from core.runs.launch import start_job
from pages.ui.audit import note
from pages.ui.text import show_error, t

_SHOWN_ROWS = 5
_NEW = "chat_samples"
_NOTICE = "chat_notice"
_OPEN = "chat_exporting"
"""In the session's state: the id of what the dialog is open for."""


def export_conversation(project: Project, conversation: Conversation) -> None:
    """The button, and its dialog: the conversation as one row, or chosen answers as a row each."""
    if _is_open("chat_export", t("chat.actions.export"), conversation.id):
        _dialog(lambda: _form(project, _rows(conversation), f"{conversation.title} ({conversation.id})"))


def export_comparison(project: Project, comparison: Comparison) -> None:
    """The button, and its dialog: a row for each question whose best answer was voted for."""
    why_not = None if comparison.votes else t("chat.compare_many.save_best_none")
    if _is_open("chat_compare_export", t("chat.compare_many.save_best"), comparison.id, why_not):
        _dialog(lambda: _form(project, best_rows(comparison), comparison.id))


def _is_open(key: str, label: str, subject: str, why_not: str | None = None) -> bool:
    """A button that opens the dialog for `subject`, and whether it is open: it stays so through reruns until it is closed."""
    st.button(
        label, key=key, icon=":material/school:", type="tertiary", disabled=why_not is not None, help=why_not,
        on_click=_open, args=(subject,),
    )  # fmt: skip
    return st.session_state.get(_OPEN) == subject


def _open(subject: str) -> None:
    st.session_state[_OPEN] = subject


def _close() -> None:
    st.session_state.pop(_OPEN, None)


def _dialog(form: Callable[[], None]) -> None:
    @st.dialog(t("chat.export.title"), width="large", on_dismiss=_close)
    def dialog() -> None:
        try:
            form()
        except DanluError as error:
            show_error(error)

    dialog()


def show_notice() -> None:
    """What the dialog did, once it has closed."""
    if notice := st.session_state.pop(_NOTICE, None):
        st.toast(notice, icon=":material/school:")


def _rows(conversation: Conversation) -> list[dict[str, Any]]:
    ways = {way: t(f"chat.export.ways.{way}") for way in ("whole", "answers")}
    way = st.segmented_control(
        t("chat.export.what"), list(ways), default="whole", required=True, format_func=ways.__getitem__,
        key="chat_export_way", label_visibility="collapsed",
    )  # fmt: skip
    if way == "whole":
        return [conversation_row(conversation)]
    names = {at: f"{number}. {_short(conversation.turns[at].content)}"
             for number, at in enumerate(answers_of(conversation), start=1)}  # fmt: skip
    chosen = st.multiselect(
        t("chat.export.answers"), list(names), default=list(names)[-1:], format_func=names.__getitem__,
        key="chat_export_answers", placeholder=t("chat.export.answers_none"), help=t("chat.export.answers_help"),
    )  # fmt: skip
    return answer_rows(conversation, sorted(chosen))


def _form(project: Project, rows: Sequence[dict[str, Any]], source: str) -> None:
    """Data set, name, preview, and the button."""
    known = {
        str(each.path.relative_to(project.data)): each.path
        for each in list_datasets(project)
        if each.problem is None and each.format.is_chat
    }
    left, right = st.columns(2)
    base = left.selectbox(
        t("chat.export.base"), ["", *known], format_func=lambda name: name or t("chat.export.base_new"),
        key="chat_export_base", help=t("chat.export.base_help"),
    )  # fmt: skip
    path = known.get(str(base))
    name = right.text_input(
        t("chat.export.name"), f"{path.stem}_chat" if path else _NEW, key=f"chat_export_name_{base}",
        help=t("chat.export.name_help"),
    )  # fmt: skip
    st.caption(t("chat.export.preview", count=len(rows)))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows[:_SHOWN_ROWS]]
    st.code("\n".join(lines) or " ", language="json", wrap_lines=True, height=220)
    if st.button(t("chat.export.go"), key="chat_export_go", type="primary", disabled=not rows):
        _append(project, path, rows, name.strip(), source)


def _append(project: Project, path: Path | None, rows: Sequence[dict[str, Any]], name: str, source: str) -> None:
    try:
        if path is not None and path.stat().st_size > INLINE_BYTES:
            arguments = {
                "project": str(project.root),
                "path": str(path),
                "added": list(rows),
                "name": name,
                "source": source,
            }
            start_job(project, "core.data.mix:append_job", kind="data_convert", title=name, arguments=arguments)
            said = t("chat.export.started", name=f"{name}.jsonl")
        else:
            made, added = append(project, path, rows, name, source=source)
            said = t("chat.export.done", name=made.name, count=added)
            st.session_state["dataset_next"] = str(made.relative_to(made.parents[0]))
    except DanluError as error:
        show_error(error)
        return
    note("export", f"{source} → {name}.jsonl")
    st.session_state[_NOTICE] = said
    _close()
    st.rerun()


def _short(text: str) -> str:
    return " ".join(text.split())[:60]
