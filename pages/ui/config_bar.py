"""The bar above a config: save, save as, discard, and take it away as the plain XTuner file with the guide's commands."""

import streamlit as st

from core.config import deepspeed, library
from core.config.export import bundle, commands
from core.config.library import Draft
from core.config.source import ConfigSource
from core.errors import DanluError, InputError
from core.project import Project
from core.xtuner.command import DEEPSPEED_CHOICES
from pages.ui.config_draft import remember_error, save
from pages.ui.config_new import show_next
from pages.ui.launch_deepspeed import deepspeed_label
from pages.ui.text import say, t


def save_bar(project: Project, draft: Draft) -> None:
    """Whether there is something to save, and the ways to do it."""
    is_changed = draft.text != draft.saved_text
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            t("config.save"),
            type="primary",
            icon=":material/save:",
            disabled=not is_changed,
            key="config_save",
            on_click=save,
            args=(project, draft),
        )
        with st.popover(t("config.save_as")):
            new_name = st.text_input(
                t("config.save_as_name"),
                f"{draft.name}_2",
                key=f"config_save_as_{draft.name}",
                help=t("config.save_as_name_help"),
            )
            st.button(
                t("config.save_as"), key="config_save_as_do", on_click=_save_as, args=(project, str(new_name), draft)
            )
        st.button(
            t("config.discard"),
            disabled=not is_changed and draft.broken_text is None,
            key="config_discard",
            on_click=lambda: library.discard_draft(project, draft.name),
        )
        export_view(project, draft)
        st.caption(t("config.unsaved" if is_changed else "config.all_saved"))


def _save_as(project: Project, name: str, draft: Draft) -> None:
    """An error is shown on the next run, above the config that is still open."""
    try:
        show_next(library.add_config(project, name, draft.text).name, "saved")
    except DanluError as error:
        remember_error(error)


def export_view(project: Project, draft: Draft) -> None:
    try:
        source = ConfigSource(draft.text)
    except InputError:
        return
    with st.popover(t("config.export.title"), icon=":material/ios_share:"):
        left, right = st.columns(2)
        chosen = left.selectbox(
            t("launch.deepspeed"),
            ["none", *DEEPSPEED_CHOICES, *deepspeed.list_own(project)],
            format_func=deepspeed_label,
            key="config_export_deepspeed",
            help=t("launch.deepspeed_help"),
        )
        cards = right.number_input(
            t("config.export.cards"), 1, 64, 1, key="config_export_cards", help=t("config.export.cards_help")
        )
        setting = None if chosen == "none" else deepspeed.find(project, chosen)
        found = commands(project, draft.name, source, deepspeed=setting, cards=int(cards))
        script = "\n".join(["#!/bin/bash", *(f"# {say(one.why)}\n{one.line}" for one in found)]) + "\n"
        st.code(script, language="bash", wrap_lines=True)
        st.caption(t("config.export.note"))
        st.download_button(
            t("config.export.download"),
            bundle(draft.name, draft.text, script, setting),
            file_name=f"{draft.name}.zip",
            mime="application/zip",
            icon=":material/download:",
            key="config_export_download",
        )
