"""The form of a config: what it shows comes from the source on each run, what is entered goes into the source at once."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from core.config import edits, fields
from core.config.facts import model_folders, read_data, read_model
from core.config.fields import Filled, Kind
from core.config.source import ConfigSource
from core.config.validation import read_validation
from core.data.library import list_datasets
from core.errors import InputError
from core.project import Project
from pages.ui.config_draft import change, remember_error
from pages.ui.config_trackers import choose_trackers
from pages.ui.config_validation import choose_validation
from pages.ui.text import t

_COLUMNS = 3


def form_view(project: Project, name: str, source: ConfigSource) -> None:
    """Model, data and method first, then the fields by group."""
    _big_choices(project, name, source)
    filled = fields.fill(source)
    for group in fields.GROUPS:
        members = [one for one in filled if one.field.group == group]
        if not members and group != "validation":
            continue
        st.markdown(f"**{t(f'config.groups.{group}')}**")
        if group == "validation":
            choose_validation(project, name, source)
            if read_validation(source) is None:
                continue
        wide = [one for one in members if one.field.kind in (Kind.LINES, Kind.TEXT)]
        narrow = [one for one in members if one not in wide]
        for one in wide:
            _field(project, name, one)
        for start in range(0, len(narrow), _COLUMNS):
            for column, one in zip(st.columns(_COLUMNS), narrow[start : start + _COLUMNS], strict=False):
                with column:
                    _field(project, name, one)
    st.divider()
    choose_trackers(project, name, source)


def _big_choices(project: Project, name: str, source: ConfigSource) -> None:
    folders = {str(folder): folder.name for folder in model_folders(project)}
    files = {str(dataset.path): dataset.path.name for dataset in list_datasets(project)}
    current_model = source.get("pretrained_model_name_or_path", None)
    current_file = next(iter(edits.data_files(source)), None)
    left, right = st.columns(2)
    with left:
        _pick(project, name, "model", folders, str(current_model))
    with right:
        _pick(project, name, "data", files, str(current_file))
    key = f"config_method_{name}"
    st.session_state[key] = edits.method_of(source)
    st.segmented_control(
        t("config.method"),
        ("qlora", "lora", "full"),
        format_func=lambda method: t(f"config.methods.{method}"),
        key=key,
        on_change=lambda: change(project, name, lambda old: edits.set_method(old, str(st.session_state[key]))),
        required=True,
    )


def _pick(project: Project, name: str, what: str, options: dict[str, str], current: str) -> None:
    """A list of the project's own, with the config's present value as a last entry where it is none of them."""
    key = f"config_{what}_{name}"
    st.session_state[key] = current if current in options else ""
    st.selectbox(
        t(f"config.{what}"),
        [*options, *([] if current in options else [""])],
        format_func=lambda path: options.get(path) or t("config.other_data"),
        key=key,
        on_change=lambda: change(project, name, partial(_put, what, str(st.session_state[key]))),
        help=t(f"config.{what}_help"),
    )


def _put(what: str, path: str, source: ConfigSource) -> ConfigSource:
    if not path:
        return source
    if what == "data":
        return edits.set_data(source, read_data(Path(path)))
    return edits.set_model_and_template(source, read_model(Path(path)))


def _field(project: Project, name: str, filled: Filled) -> None:
    """One widget. Its value is set from the source before it is drawn, so that form and source are one."""
    field, value = filled.field, fields.shown(filled)
    label, key = t(f"config.fields.{field.key}.label"), f"config_field_{name}_{field.key}"
    if not filled.is_editable:
        st.text_input(label, str(value), disabled=True, help=_help(filled), key=f"{key}_shown")
        return
    options: dict[str, Any] = {
        "help": _help(filled),
        "key": key,
        "on_change": lambda: _entered(project, name, filled, st.session_state[key]),
    }
    if field.kind is Kind.CHOICE:
        choices, shown = list(fields.choices(field)), "" if value is None else str(value)
        st.session_state[key] = shown
        st.selectbox(
            label, choices if shown in choices else [shown, *choices], format_func=lambda one: one or "—", **options
        )
    elif field.kind is Kind.SWITCH:
        st.session_state[key] = bool(value)
        st.toggle(label, **options)
    elif field.kind is Kind.LINES:
        st.session_state[key] = "\n".join(str(line).replace("\n", "\\n") for line in value or [])
        st.text_area(label, height=100, **options)
    else:
        st.session_state[key] = f"{value:g}" if isinstance(value, float) else str(value)
        st.text_input(label, **options)


def _entered(project: Project, name: str, filled: Filled, value: Any) -> None:
    try:
        parsed = _parse(filled, value)
    except InputError as error:
        remember_error(error)
        return
    change(project, name, lambda source: fields.write(source, filled, parsed))


def _parse(filled: Filled, value: Any) -> Any:
    if filled.field.kind is Kind.LINES:
        return [line for line in str(value).splitlines() if line.strip()]
    if filled.field.kind not in (Kind.INTEGER, Kind.NUMBER):
        return value
    try:
        number = float(value)
    except ValueError as error:
        raise InputError("config.not_a_number", value=value) from error
    if not math.isfinite(number) or (filled.field.kind is Kind.INTEGER and not number.is_integer()):
        raise InputError("config.not_a_number", value=value)
    return number


def _help(filled: Filled) -> str:
    parts = [t(f"config.fields.{filled.field.key}.help")]
    if filled.field.usual is not None:
        parts.append(t("config.usual", low=f"{filled.field.usual[0]:g}", high=f"{filled.field.usual[1]:g}"))
    return "  \n".join([*parts, t("config.written_as", path=filled.path)])
