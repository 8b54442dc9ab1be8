"""Model: the base models of the project and of this machine, and the ways to get one."""

from pathlib import Path

import streamlit as st

from core.errors import DanluError
from core.files import require_absent
from core.models.embedded import NAME
from core.models.inspect import ModelCard
from core.models.library import find_models, free_name, link_model, require_whole
from core.models.remote_code import allow, code_files, is_allowed
from core.project import Project
from core.runs.jobs import active_jobs
from core.runs.launch import start_job
from pages.ui import shell
from pages.ui.jobs import job_panel
from pages.ui.text import gib, say, show_error, t

KINDS = ("dequantize", "copy", "download")


def count(number: int | None) -> str:
    """135 M, 1.9 B."""
    if number is None:
        return "–"
    return (
        f"{number / 1e9:.1f} B"
        if number >= 1e9
        else f"{number / 1e6:.0f} M"
        if number >= 1e6
        else f"{number / 1e3:.0f} K"
    )


def summary(card: ModelCard) -> str:
    parts = [
        t("model.parameters", count=count(card.parameters)),
        card.dtype or "–",
        t("model.context", count=card.context_length or "–"),
        gib(card.disk_bytes),
        t("model.chat") if card.is_chat else t("model.base"),
    ]
    parts += [t("model.no_template")] if not card.has_chat_template else []
    parts += [t("model.license", name=card.license)] if card.license else []
    return " · ".join(parts)


def show_card(card: ModelCard, project: Project) -> None:
    with st.container(border=True):
        title = card.name if card.path != project.model else "model/"
        badges = [t("model.is_link")] if card.is_link else []
        badges += [t("model.remote_code")] if card.needs_remote_code else []
        badges += [t(f"model.source_{card.source}")] if card.source != "project" else []
        st.markdown(
            f"**{title}** · {card.architecture or '–'} " + " ".join(f":gray-badge[{badge}]" for badge in badges)
        )
        st.caption(summary(card))
        for problem in card.problems:
            st.warning(say(problem), icon=":material/warning:")
        if card.needs_remote_code and card.source == "project":
            show_code(card, project)
        if card.source != "project":
            show_adding(str(card.path), card.name, project, key=f"found_{card.path}")
        else:
            with st.expander(t("model.details")):
                show_details(card)


def show_details(card: ModelCard) -> None:
    is_so = {True: t("model.yes"), False: t("model.no")}
    rows = {
        "architecture": f"{card.architecture} ({card.model_type})",
        "vocabulary": card.vocabulary_size,
        "tokenizer": card.tokenizer_class,
        "bos": is_so[card.has_bos],
        "tied": is_so[card.is_tied],
        "path": card.path,
    }
    st.table({t(f"model.{name}"): str(value) for name, value in rows.items() if value is not None})


def show_code(card: ModelCard, project: Project) -> None:
    if is_allowed(project, card.path):
        st.caption(f":material/verified_user: {t('model.code_allowed')}")
        return
    st.warning(t("model.code_question"), icon=":material/shield:")
    files = code_files(card.path)
    with st.expander(t("model.code_files", count=len(files))):
        for file in files:
            st.caption(file.name)
            st.code(file.read_text(encoding="utf-8", errors="replace"), language="python", height=240)
    if st.button(t("model.code_allow"), key=f"model_allow_{card.name}", icon=":material/verified_user:"):
        allow(project, card.path)
        st.rerun()


def show_adding(source: str, name: str, project: Project, key: str) -> None:
    """Copy and link for one source folder."""
    left, right, text = st.columns([1, 1, 4], vertical_alignment="center")
    is_busy = bool(active_jobs(project, KINDS))
    is_copy = left.button(t("model.copy"), key=f"model_copy_{key}", disabled=is_busy or not source, width="stretch")
    is_link = right.button(t("model.link"), key=f"model_link_{key}", disabled=not source, width="stretch")
    text.caption(t("model.copy_help"))
    try:
        if is_copy:
            target = free_name(project, name)
            require_whole(Path(source).expanduser())
            require_absent(target)
            arguments = {"source": source, "target": str(target)}
            start_job(project, "core.models.library:copy_model", kind="copy", title=name, arguments=arguments)
            st.rerun()
        if is_link:
            link_model(Path(source), free_name(project, name))
            st.toast(t("model.linked", name=name))
            st.rerun()
    except DanluError as error:
        show_error(error)


def show_embedded(project: Project) -> None:
    st.markdown(t("model.embedded_text"))
    is_there = (project.model / NAME).exists()
    if is_there:
        st.caption(f":material/check: {t('model.embedded_done')}")
    kind = "primary" if not cards else "secondary"
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
            st.rerun()
        except DanluError as error:
            show_error(error)


def show_folder(project: Project) -> None:
    source = st.text_input(t("model.folder_path"), key="model_folder", help=t("model.folder_help")).strip()
    guess = Path(source).expanduser().name if source else ""
    name = st.text_input(t("model.folder_name"), guess, key=f"model_name_{guess}").strip()
    show_adding(source, name, project, key="folder")


project = shell.require_project()
shell.page_header("model")
cards = find_models(project, shell.settings())
job_panel(project, KINDS)
mine = [card for card in cards if card.source == "project"]
if not mine:
    st.info(t("model.none"), icon=":material/deployed_code:")
else:
    st.subheader(t("model.yours"))
for card in mine:
    show_card(card, project)
st.subheader(t("model.get"))
embedded, folder = st.tabs([t("model.embedded"), t("model.folder")])
with embedded:
    show_embedded(project)
with folder:
    show_folder(project)
if elsewhere := [card for card in cards if card.source != "project"]:
    st.subheader(t("model.elsewhere"))
for card in elsewhere:
    show_card(card, project)
