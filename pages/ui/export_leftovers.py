"""Exports that were killed in the middle: what of them lies hidden on the disk, how they go on, and a way to be rid of them."""

import streamlit as st

from core.checkpoints.staging import Leftover, leftovers, remove_leftover
from core.errors import DanluError
from core.project import Project
from pages.ui.audit import note
from pages.ui.text import gib, show_error, t


def leftovers_panel(project: Project) -> None:
    """Not there where nothing was left."""
    for parent in (project.huggingface, project.final_model):
        for item in leftovers(parent):
            _row(item)


def _row(item: Leftover) -> None:
    name = f"{item.target.parent.name}/{item.target.name}"
    with st.container(border=True):
        words, action = st.columns([5, 1], vertical_alignment="center")
        words.markdown(f":material/pause_circle: {t('export.leftover', name=name, size=gib(item.size_bytes))}")
        if action.button(t("export.leftover_remove"), key=f"export_leftover_{name}", width="stretch"):
            try:
                remove_leftover(item.target)
            except DanluError as error:
                show_error(error)
            else:
                note("delete", name)
                st.rerun()
