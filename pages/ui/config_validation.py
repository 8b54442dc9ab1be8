"""Validation in the form of a config: on which data, or how much of the training data is held out for it."""

from functools import partial
from pathlib import Path

import streamlit as st

from core.config.edits import data_files
from core.config.facts import read_data
from core.config.source import ConfigSource
from core.config.validation import Validation, hold_out, read_validation, set_validation
from core.data.library import list_datasets
from core.errors import InputError
from core.project import Project
from pages.ui.config_draft import change
from pages.ui.text import t

_USUAL_PERCENT = 5


def choose_validation(project: Project, name: str, source: ConfigSource) -> None:
    """A file of the project, none, or a new part of the training data."""
    validation = read_validation(source)
    choice, percent, button = st.columns([3.4, 1.6, 1.8], vertical_alignment="bottom")
    with choice:
        _choose_file(project, name, source, validation)
    share = percent.number_input(
        t("config.hold_out_share"), 1, 50, _USUAL_PERCENT, key=f"config_hold_out_{name}", help=t("config.hold_out_help")
    )
    # Without a file of its own the config has nothing to hold out of.
    is_possible = len(data_files(source)) == 1
    if button.button(
        t("config.hold_out_do", percent=share), key=f"config_hold_out_do_{name}", icon=":material/call_split:",
        width="stretch", disabled=not is_possible,
    ):  # fmt: skip
        with st.spinner(t("config.holding_out")):
            change(project, name, partial(hold_out, project, percent=int(share)))
        st.session_state["config_notice"] = "held_out"
        st.rerun()
    if validation is not None:
        st.caption(_note(validation))


def _choose_file(project: Project, name: str, source: ConfigSource, validation: Validation | None) -> None:
    trained_on = set(data_files(source))
    files = {str(data.path): data.path.name for data in list_datasets(project) if str(data.path) not in trained_on}
    current = validation.files[0] if validation else ""
    options = {"": t("config.no_validation"), **files, **({current: Path(current).name} if current else {})}
    key = f"config_validation_{name}"
    st.session_state[key] = current
    st.selectbox(
        t("config.validation"),
        list(options),
        format_func=lambda path: options[path],
        key=key,
        help=t("config.validation_help"),
        on_change=lambda: change(project, name, partial(_put, str(st.session_state[key]))),
    )


def _put(path: str, source: ConfigSource) -> ConfigSource:
    return set_validation(source, read_data(Path(path)) if path else None)


def _note(validation: Validation) -> str:
    """What will be computed and how often; the number of rows where the file is there."""
    name = ", ".join(Path(file).name for file in validation.files)
    try:
        rows = f"{sum(read_data(Path(file)).rows for file in validation.files):,}"
    except InputError:
        rows = "?"
    return t("config.validation_note", name=name, rows=rows, every=f"{validation.every:,}")
