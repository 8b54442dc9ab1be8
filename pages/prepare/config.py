"""Configs of the project: made for the model or copied from XTuner, edited by form or source, checked all the while."""

from dataclasses import replace

import streamlit as st

from core.config import library
from core.config.checks import Surroundings
from core.config.facts import model_folders, read_machine
from core.config.source import ConfigSource
from core.data.library import list_datasets
from core.errors import DanluError, InputError
from pages.ui import shell
from pages.ui.config_bar import save_bar
from pages.ui.config_draft import pop_error
from pages.ui.config_form import form_view
from pages.ui.config_new import new_forms
from pages.ui.config_recipes import guide_view
from pages.ui.config_views import changes_view, checks_view, source_view
from pages.ui.text import show_error, t

VIEWS = ("form", "guide", "source", "changes")


def choose(names: list[str]) -> str:
    """The config on show: one just made, else the one open before, else the newest."""
    wanted = st.session_state.pop("config_next", None) or st.session_state.get("config_open")
    st.session_state["config_name"] = wanted if wanted in names else names[0]
    name = st.selectbox(
        t("config.open"),
        names,
        key="config_name",
        on_change=lambda: st.session_state.update(config_open=st.session_state["config_name"]),
        help=t("config.open_help"),
    )
    st.session_state["config_open"] = name
    return name


def editor(name: str) -> None:
    draft = library.open_draft(project, name)
    save_bar(project, draft)
    try:
        source = ConfigSource(draft.text)
    except InputError:
        # A file that never parsed can only be mended as text.
        source_view(project, name, draft if draft.broken_text else replace(draft, broken_text=draft.text))
        return
    left, right = st.columns([7, 3], gap="medium")
    with left:
        view = st.segmented_control(
            t("config.open"),
            VIEWS,
            default="form",
            format_func=lambda one: t(f"config.tab_{one}"),
            key="config_view",
            label_visibility="collapsed",
            required=True,
        )
        if view == "form":
            form_view(project, name, source)
        elif view == "guide":
            guide_view(project, name, source)
        elif view == "source":
            source_view(project, name, draft)
        else:
            changes_view(project, name, draft)
    with right:
        files = [dataset.path for dataset in list_datasets(project) if dataset.is_trainable]
        around = Surroundings(read_machine(project), models=model_folders(project), data_files=files, root=project.root)
        checks_view(project, name, source, around)


project = shell.require_project()
shell.page_header("config")
if st.session_state.pop("config_close_new", False):
    st.session_state["config_is_adding"] = False
if notice := st.session_state.pop("config_notice", None):
    st.toast(t(f"config.{notice}", name=st.session_state.get("config_next") or ""), icon=":material/check_circle:")
try:
    names = [config.name for config in library.list_configs(project)]
    if names:
        left, right = st.columns([5, 1], vertical_alignment="bottom")
        with left:
            name = choose(names)
        is_adding = right.toggle(t("config.new"), key="config_is_adding", help=t("config.new_help"))
    else:
        st.info(t("config.no_configs"), icon=":material/tune:")
        is_adding = True
    if is_adding:
        with st.container(border=True):
            new_forms(project)
    if error := pop_error():
        show_error(error)
    if names:
        editor(name)
except DanluError as error:
    show_error(error)
