"""Model: the base models of the project and of this machine, and the ways to get one."""

from pathlib import Path

import streamlit as st

from core.errors import DanluError
from core.models.embedded import NAME
from core.models.library import free_name, project_cards
from core.project import Project
from core.runs.jobs import active_jobs
from core.runs.launch import start_job
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.jobs import job_panel
from pages.ui.model_cards import KINDS, found_on_machine, show_adding, show_card
from pages.ui.model_download import download_form, show_unfinished
from pages.ui.text import show_error, t


def show_embedded(project: Project) -> None:
    st.markdown(t("model.embedded_text"))
    is_there = (project.model / NAME).exists()
    if is_there:
        st.caption(f":material/check: {t('model.embedded_done')}")
    kind = "primary" if not mine else "secondary"
    if st.button(
        t("model.embedded_button"),
        key="model_embedded",
        type=kind,
        disabled=is_there or bool(active_jobs(project, KINDS)),
    ):
        try:
            target = free_name(project, NAME)
            function = "core.models.embedded:write_embedded_model"
            start_job(project, function, kind="dequantize", title=NAME, arguments={"target": str(target)})
            note("start", f"dequantize {NAME}")
            st.rerun()
        except DanluError as error:
            show_error(error)


def show_folder(project: Project) -> None:
    source = st.text_input(t("model.folder_path"), key="model_folder", help=t("model.folder_help")).strip()
    guess = Path(source).expanduser().name if source else ""
    name = st.text_input(
        t("model.folder_name"), guess, key=f"model_name_{guess}", help=t("model.folder_name_help")
    ).strip()
    show_adding(source, name, project, key="folder")


def show_elsewhere(project: Project) -> None:
    """Models outside the project; read once a minute, since the folder may lie on a slow disk."""
    asked = st.session_state.setdefault("model_asked", 0)
    with st.spinner(t("model.looking")):
        found = found_on_machine(str(shell.settings().shared_models or ""), asked)
    if not found:
        return
    left, right = st.columns([5, 1], vertical_alignment="bottom")
    left.subheader(t("model.elsewhere"))
    if right.button(t("model.look_again"), key="model_look_again", width="stretch"):
        st.session_state["model_asked"] = asked + 1
        st.rerun()
    for card in found:
        show_card(card, project)


project = shell.require_project()
shell.page_header("model")
mine = project_cards(project)
if not mine:
    st.info(t("model.none"), icon=":material/deployed_code:")
else:
    st.subheader(t("model.yours"))
for card in mine:
    show_card(card, project)
st.subheader(t("model.get"))
job_panel(project, KINDS)
show_unfinished(project)
embedded, hub, folder = st.tabs(
    [
        f":material/inventory_2: {t('model.embedded')}",
        f":material/cloud_download: {t('model.download')}",
        f":material/folder_open: {t('model.folder')}",
    ]
)
with embedded:
    show_embedded(project)
with hub:
    try:
        download_form(project)
    except DanluError as error:
        show_error(error)
with folder:
    show_folder(project)
show_elsewhere(project)
