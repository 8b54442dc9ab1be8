"""Making a new config: one written for the project's model, a copy of one of XTuner's, or a file from elsewhere."""

from pathlib import Path

import streamlit as st

from core.config import library, presets
from core.config.facts import model_folders, read_data, read_machine, read_model
from core.data.library import list_datasets
from core.errors import DanluError
from core.project import Project
from core.xtuner import catalogue
from core.xtuner.catalogue import ConfigEntry
from pages.ui import shell
from pages.ui.text import say, show_error, t

_TABLE_PIXELS, _ROW_PIXELS = 260, 35


def new_forms(project: Project) -> None:
    """Three ways side by side in tabs."""
    preset, shipped, brought = st.tabs([t("config.tab_preset"), t("config.tab_catalogue"), t("config.tab_file")])
    with preset:
        _preset(project)
    with shipped:
        _catalogue(project)
    with brought:
        _file(project)


def show_next(name: str, notice: str) -> None:
    """Make the page show this config from its next run on."""
    st.session_state["config_next"] = name
    st.session_state["config_notice"] = notice
    st.session_state["config_close_new"] = True


def _opened(name: str, notice: str) -> None:
    show_next(name, notice)
    st.rerun()


def _preset(project: Project) -> None:
    folders = model_folders(project)
    if not folders:
        shell.missing(t("config.no_model"), "model")
        return
    files = [dataset.path for dataset in list_datasets(project)]
    left, middle, right = st.columns(3)
    folder = left.selectbox(
        t("config.model"),
        folders,
        format_func=lambda path: path.name,
        key="config_new_model",
        help=t("config.model_help"),
    )
    file = middle.selectbox(
        t("config.data"), [*files, None], format_func=_file_name, key="config_new_data", help=t("config.data_help")
    )
    methods = ("lora", "qlora", "full")
    machine = read_machine(project)
    method = right.segmented_control(
        t("config.method"),
        methods,
        default="qlora" if machine.gpu_count else "lora",
        format_func=lambda name: t(f"config.methods.{name}"),
        key="config_new_method",
        required=True,
    )
    st.caption(f"{t(f'config.method_notes.{method}')} {t('config.made_note')}")
    if not files:
        st.caption(t("config.no_data"))
    if st.button(t("config.make"), type="primary", icon=":material/auto_fix_high:", key="config_new_make"):
        model, data = read_model(folder), read_data(file) if file else None
        text = presets.make(model, data, machine, presets.Wishes(method=str(method)))
        made = library.add_config(project, presets.file_name(model, data, str(method)), text, is_exact=False)
        _opened(made.name, "made")


def _file_name(file: Path | None) -> str:
    return "—" if file is None else file.name


def _catalogue(project: Project) -> None:
    left, middle, right = st.columns([3, 3, 2], vertical_alignment="bottom")
    pattern = left.text_input(
        t("config.search"),
        placeholder=t("config.search_placeholder"),
        key="config_search",
        help=t("config.search_help"),
    )
    methods = middle.multiselect(
        t("config.filter_method"),
        catalogue.METHODS,
        format_func=lambda name: t(f"config.methods.{name}"),
        key="config_methods",
        placeholder=t("config.filter_method_all"),
        help=t("config.filter_method_help"),
    )
    only_loadable = right.checkbox(t("config.only_loadable"), value=True, key="config_only_loadable")
    entries = catalogue.search(pattern, methods=methods, only_loadable=only_loadable)
    st.caption(t("config.count", count=len(entries)))
    choice = st.dataframe(
        [_row(entry, is_loadable=only_loadable) for entry in entries],
        height=min(_TABLE_PIXELS, _ROW_PIXELS * (len(entries) + 1) + 3),
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="config_table",
    )
    rows = [row for row in choice["selection"]["rows"] if row < len(entries)]
    entry = entries[rows[0]] if rows else entries[0] if len(entries) == 1 else None
    if entry is None:
        st.caption(t("config.select_row"))
        return
    if entry.obstacle is not None:
        st.warning(t("config.not_loadable", reason=say(entry.obstacle)), icon=":material/block:")
    if st.button(
        f"{t('config.copy')} · {entry.name}", type="primary", icon=":material/content_copy:", key="config_copy"
    ):
        _opened(library.copy_config(entry, project).name, "copied")


def _file(project: Project) -> None:
    st.caption(t("config.file_note"))
    file = st.file_uploader(
        t("config.file"), type=["py"], max_upload_size=1, key="config_file", label_visibility="collapsed"
    )
    if st.button(
        t("config.file_take"), type="primary", icon=":material/upload_file:", key="config_file_take", disabled=not file
    ):
        try:
            taken = library.import_config(project, file.name, file.getvalue())
        except DanluError as error:
            show_error(error)
            return
        _opened(taken.name, "taken")


def _row(entry: ConfigEntry, *, is_loadable: bool) -> dict[str, object]:
    """What matters most on the left: the table is wider than the page. Of configs that all work, nobody needs to read that."""
    state = {} if is_loadable else {"state": "✓" if entry.obstacle is None else f"✗ {say(entry.obstacle)}"}
    values = {
        "name": entry.name,
        "method": t(f"config.methods.{entry.method}"),
        "size": entry.size or "",
        **state,
        "data": entry.data,
        "epochs": "" if entry.epochs is None else str(entry.epochs),
        "model": entry.base_model or entry.model,
    }
    return {t(f"config.columns.{key}"): value for key, value in values.items()}
