"""A card for each base model: what it is, what XTuner makes of it, its own code and the consent to it, copy and link."""

from pathlib import Path

import streamlit as st

from core.errors import DanluError
from core.files import require_absent
from core.models.inspect import ModelCard
from core.models.library import free_name, link_model, machine_cards, require_whole
from core.models.remote_code import allow, code_files, is_allowed
from core.models.support import Level, Support, support
from core.project import Project
from core.runs.jobs import active_jobs
from core.runs.launch import start_job
from core.settings import Settings
from pages.ui.audit import note
from pages.ui.text import gib, say, show_error, t

KINDS = ("dequantize", "copy", "download")
_LEVEL_COLOURS = {Level.TUNED: "green", Level.PLAIN: "blue", Level.UNSUPPORTED: "red", Level.UNKNOWN: "gray"}
_SHOWN_CHARACTERS = 20_000


@st.cache_data(ttl=60, max_entries=4, show_spinner=False)
def found_on_machine(shared_models: str, asked: int) -> list[ModelCard]:
    """Models outside the project; a shared folder on a network disk is slow to read. `asked` counts the wishes to look again."""
    del asked
    return machine_cards(Settings(shared_models=Path(shared_models) if shared_models else None))


def show_card(card: ModelCard, project: Project) -> None:
    with st.container(border=True):
        known = support(card)
        title = card.name if card.path != project.model else "model/"
        badges = [t("model.is_link")] if card.is_link else []
        badges += [t("model.remote_code")] if card.needs_remote_code else []
        badges += [t(f"model.source_{card.source}")] if card.source != "project" else []
        level = f":{_LEVEL_COLOURS[known.level]}-badge[{t(f'model.level_{known.level}')}]"
        st.markdown(
            f"**{title}** · {card.architecture or '–'} {level} " + " ".join(f":gray-badge[{badge}]" for badge in badges)
        )
        st.caption(_summary(card))
        for problem in [*card.problems, *(lack for lack in known.lacks if known.level is Level.UNSUPPORTED)]:
            st.warning(say(problem), icon=":material/warning:")
        if card.needs_remote_code and card.source == "project":
            _show_code(card, project)
        if card.source != "project":
            show_adding(str(card.path), card.name, project, key=f"found_{card.path}")
        with st.expander(t("model.details")):
            _show_details(card, known)


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
            note("start", f"copy {name}")
            st.rerun()
        if is_link:
            link_model(Path(source), free_name(project, name))
            st.toast(t("model.linked", name=name))
            st.rerun()
    except DanluError as error:
        show_error(error)


def _summary(card: ModelCard) -> str:
    parts = [
        t("model.parameters", count=_count(card.parameters)),
        card.dtype or "–",
        t("model.context", count=card.context_length or "–"),
        gib(card.disk_bytes),
        t("model.chat") if card.is_chat else t("model.base"),
        t("model.license", name=card.license) if card.license else t("model.no_license"),
    ]
    return " · ".join(parts)


def _count(number: int | None) -> str:
    """135 M, 1.9 B."""
    if number is None:
        return "–"
    for factor, sign, digits in ((1e9, "B", 1), (1e6, "M", 0), (1e3, "K", 0)):
        if number >= factor:
            return f"{number / factor:.{digits}f} {sign}"
    return str(number)


def _show_details(card: ModelCard, known: Support) -> None:
    is_so = {True: t("model.yes"), False: t("model.no")}
    rows = {
        "architecture": f"{card.architecture} ({card.model_type})",
        "support": t(f"model.level_{known.level}_long"),
        "lacks": " ".join(say(lack) for lack in known.lacks) or t("model.lacks_nothing"),
        "xtuner_template": known.template or "–",
        "chat_template": is_so[card.has_chat_template],
        "tokenizer": card.tokenizer_class,
        "vocabulary": card.vocabulary_size,
        "bos": is_so[card.has_bos],
        "tied": is_so[card.is_tied],
        "path": card.path,
    }
    st.table({t(f"model.{name}"): str(value) for name, value in rows.items() if value is not None})


def _show_code(card: ModelCard, project: Project) -> None:
    if is_allowed(project, card.path):
        st.caption(f":material/verified_user: {t('model.code_allowed')}")
        return
    st.warning(t("model.code_question"), icon=":material/shield:")
    files = code_files(card.path)
    with st.expander(t("model.code_files", count=len(files))):
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            st.caption(str(file.relative_to(card.path)))
            st.code(text[:_SHOWN_CHARACTERS], language="python", height=240)
            if len(text) > _SHOWN_CHARACTERS:
                st.caption(t("model.code_more", count=len(text) - _SHOWN_CHARACTERS, path=str(file)))
    if st.button(t("model.code_allow"), key=f"model_allow_{card.name}", icon=":material/verified_user:"):
        allow(project, card.path)
        note("allow", card.name)
        st.rerun()
