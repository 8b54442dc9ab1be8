"""The config being edited: its draft lies on disk, every edit goes through `change`. Form, guide, source and checks share it."""

from collections.abc import Callable
from dataclasses import replace

import streamlit as st

from core.config import library
from core.config.library import Draft
from core.config.source import ConfigSource
from core.errors import DanluError, InputError
from core.project import Project

_ERROR = "config_error"


def change(project: Project, name: str, edit: Callable[[ConfigSource], ConfigSource]) -> None:
    """Apply an edit to the draft and keep it; what is wrong with it is shown on the next run."""
    try:
        draft = library.open_draft(project, name)
        edited = edit(ConfigSource(draft.text))
        library.keep_draft(project, replace(draft, text=edited.text, broken_text=None))
    except DanluError as error:
        remember_error(error)


def change_text(project: Project, name: str, text: str) -> None:
    """Take over typed source; text that does not parse is kept beside the last good version."""
    try:
        draft = library.open_draft(project, name)
        try:
            ConfigSource(text)
        except InputError:
            library.keep_draft(project, replace(draft, broken_text=text))
        else:
            library.keep_draft(project, replace(draft, text=text, broken_text=None))
    except DanluError as error:
        remember_error(error)


def save(project: Project, draft: Draft) -> None:
    try:
        library.save_config(project, draft)
        st.session_state["config_notice"] = "saved"
    except DanluError as error:
        remember_error(error)


def remember_error(error: DanluError) -> None:
    st.session_state[_ERROR] = error


def pop_error() -> DanluError | None:
    """The error of the last edit, once."""
    error = st.session_state.pop(_ERROR, None)
    return error if isinstance(error, DanluError) else None
