"""Three ways to a data set: the assistant generator, an upload, a file of this machine."""

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from core.data import library
from core.data.generate import FILE_NAME, MOST_ROWS, Assistant, write_assistant
from core.errors import DanluError
from core.project import Project
from core.runs.launch import start_job
from pages.ui.audit import note
from pages.ui.text import language, show_error, t

_LANGUAGES = ("zh", "en", "both")


def add_forms(project: Project) -> None:
    generate, upload, local = st.tabs(
        [
            f":material/smart_toy: {t('dataset.add_generate')}",
            f":material/upload_file: {t('dataset.add_upload')}",
            f":material/folder_open: {t('dataset.add_path')}",
        ]
    )
    with generate:
        _generate_form(project)
    with upload:
        _upload_form(project)
    with local:
        _path_form(project)


def show_next(path: Path, project: Project) -> None:
    """Run the page again with this data set chosen."""
    name = str(
        path.relative_to(project.data.resolve() if path.is_relative_to(project.data.resolve()) else project.data)
    )
    st.session_state["dataset_next"] = name
    st.session_state["dataset_notice"] = t("dataset.saved", name=name)
    st.rerun()


def attempt(action: Callable[[], Path], project: Project) -> None:
    """Do it and show the new data set, or say why not."""
    try:
        path = action()
    except DanluError as error:
        show_error(error)
        return
    show_next(path, project)


def _generate_form(project: Project) -> None:
    st.caption(t("dataset.generate_intro", file=FILE_NAME))
    with st.form("dataset_generate", border=False):
        left, middle, right = st.columns([2, 2, 2])
        name = left.text_input(
            t("dataset.assistant_name"),
            key="dataset_name",
            placeholder=t("dataset.assistant_name_example"),
            help=t("dataset.assistant_name_help"),
        )
        author = middle.text_input(
            t("dataset.author"),
            key="dataset_author",
            placeholder=t("dataset.author_example"),
            help=t("dataset.author_help"),
        )
        tongue = right.selectbox(
            t("dataset.language"),
            _LANGUAGES,
            index=_LANGUAGES.index(language()),
            format_func={code: t(f"dataset.languages.{code}") for code in _LANGUAGES}.__getitem__,
            key="dataset_language",
            help=t("dataset.language_help"),
        )
        left, middle, right = st.columns([2, 2, 2], vertical_alignment="bottom")
        rows = left.number_input(
            t("dataset.row_count"), 10, MOST_ROWS, 400, step=50, key="dataset_rows", help=t("dataset.row_count_help")
        )
        share = middle.slider(
            t("dataset.general"), 0, 50, 10, format="%d%%", key="dataset_general", help=t("dataset.general_help")
        )
        if right.form_submit_button(t("dataset.generate"), type="primary", width="stretch", key="dataset_generate_go"):
            assistant = Assistant(
                name=name.strip(), author=author.strip(), language=tongue, rows=int(rows), general_share=share / 100
            )
            if not assistant.name or not assistant.author:
                st.warning(t("dataset.name_needed"), icon=":material/edit:")
            else:
                attempt(lambda: write_assistant(project, assistant), project)


def _upload_form(project: Project) -> None:
    st.caption(t("dataset.upload_intro"))
    with st.form("dataset_upload", border=False, clear_on_submit=True):
        file = st.file_uploader(
            t("dataset.upload"),
            type=[suffix[1:] for suffix in library.SUFFIXES],
            key="dataset_upload_file",
            label_visibility="collapsed",
        )
        if st.form_submit_button(t("dataset.upload_go"), type="primary", key="dataset_upload_go"):
            if file is None:
                st.warning(t("dataset.file_needed"), icon=":material/upload_file:")
            else:
                note("upload", file.name)
                attempt(lambda: library.add_file(project, file.name, file, file.size), project)


def _path_form(project: Project) -> None:
    st.caption(t("dataset.path_intro"))
    with st.form("dataset_path", border=False):
        path = st.text_input(
            t("dataset.path"),
            key="dataset_path_text",
            placeholder="/root/share/data/train.jsonl",
            help=t("dataset.path_help"),
        )
        if st.form_submit_button(t("dataset.path_go"), type="primary", key="dataset_path_go") and path.strip():
            try:
                source = library.readable_source(path.strip())
            except DanluError as error:
                show_error(error)
            else:
                arguments = {"project": str(project.root), "source": str(source)}
                start_job(
                    project, "core.data.library:copy_file", kind="data_copy", title=source.name, arguments=arguments
                )
                note("start", f"copy {source.name}")
                st.rerun()
