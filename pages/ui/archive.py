"""A project as one file: what goes in, the job that writes it, what another one holds, the job that makes a project of it."""

from pathlib import Path
from typing import Final

import streamlit as st

from core.archive import pack, unpack
from core.archive.contents import GROUPS, Choice, Plan, plan_export
from core.data.library import list_datasets
from core.errors import DanluError
from core.project import Project
from core.runs.jobs import active_jobs
from pages.ui.audit import note
from pages.ui.jobs import job_panel
from pages.ui.projects import settings
from pages.ui.text import gib, show_error, t

_KINDS: Final = (pack.KIND, unpack.KIND)
_LARGEST_DOWNLOAD_BYTES: Final = 2 * 2**30


def show_archive(project: Project) -> None:
    """Both ways, and the job that is under way."""
    out, back = st.tabs([t("archive.export"), t("archive.import")])
    is_busy = bool(active_jobs(project, _KINDS))
    with out:
        _export(project, is_busy=is_busy)
    with back:
        _import(project, is_busy=is_busy)
    job_panel(project, _KINDS)


def _export(project: Project, *, is_busy: bool) -> None:
    st.caption(t("archive.export_intro"))
    sizes = {str(item.path.relative_to(project.data)): item.size_bytes for item in list_datasets(project)}
    chosen = st.multiselect(
        t("archive.data"), list(sizes), key="archive_data", format_func=lambda name: f"{name} · {gib(sizes[name])}",
        placeholder=t("archive.no_data"), help=t("archive.data_help"),
    )  # fmt: skip
    has_conversations = st.toggle(t("archive.conversations"), key="archive_conversations")
    choice = Choice(tuple(chosen), has_conversations)
    try:
        plan = plan_export(project, choice)
    except (DanluError, OSError) as error:
        show_error(error) if isinstance(error, DanluError) else st.error(str(error))
        return
    _plan(plan)
    if st.button(t("archive.export_go"), key="archive_export", type="primary", disabled=is_busy or not plan.files):
        pack.start_export(project, choice)
        note("export", project.name)
        st.rerun()
    for file in sorted(pack.exports_folder(project).glob("*.danlu.zip"), reverse=True)[:3]:
        _offer(file)


def _offer(file: Path) -> None:
    size_bytes = file.stat().st_size
    text, button = st.columns([4, 1], vertical_alignment="center")
    text.caption(t("archive.made", path=str(file), size=gib(size_bytes)))
    if size_bytes <= _LARGEST_DOWNLOAD_BYTES:
        button.download_button(
            t("archive.download"), file.read_bytes, file_name=file.name, key=f"archive_get_{file.name}", width="stretch",
            on_click=lambda: note("export", file.name),
        )  # fmt: skip


def _import(project: Project, *, is_busy: bool) -> None:
    st.caption(t("archive.import_intro"))
    with st.form("archive_upload", border=False, clear_on_submit=True):
        file = st.file_uploader(t("archive.file"), type=["zip"], key="archive_file", label_visibility="collapsed")
        path = st.text_input(
            t("archive.path"),
            key="archive_path",
            placeholder="/root/ft_20260101_120000.danlu.zip",
            help=t("archive.path_help"),
        )
        is_look = st.form_submit_button(t("archive.look"), key="archive_look")
    try:
        if is_look and file is not None:
            note("upload", file.name)
            st.session_state["archive_found"] = str(unpack.keep_upload(project, file.name, file))
        elif is_look and path.strip():
            st.session_state["archive_found"] = str(Path(path.strip()).expanduser())
        found = st.session_state.get("archive_found")
        if found:
            _offer_import(project, unpack.inspect_archive(Path(found)), is_busy=is_busy)
    except DanluError as error:
        st.session_state.pop("archive_found", None)
        show_error(error)


def _offer_import(project: Project, card: unpack.ArchiveCard, *, is_busy: bool) -> None:
    st.markdown(t("archive.found", name=card.name, created=card.created_at[:16].replace("T", " ")))
    _plan(card.plan)
    st.warning(t("archive.code_note"), icon=":material/shield:")
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    name = left.text_input(
        t("archive.new_name"), card.name, key=f"archive_name_{card.path.name}", help=t("archive.new_name_help")
    ).strip()
    if right.button(t("archive.import_go"), key="archive_import", type="primary", width="stretch", disabled=is_busy):
        unpack.start_import(project, card.path, settings().home, name)
        note("import", name)
        st.session_state.pop("archive_found", None)
        st.rerun()


def _plan(plan: Plan) -> None:
    counts = {t(f"archive.groups.{name}"): plan.groups[name] for name in GROUPS if plan.groups[name].files}
    lines = [
        t("archive.count", group=name, files=f"{one.files:,}", size=gib(one.size_bytes)) for name, one in counts.items()
    ]
    st.markdown("\n".join(f"- {line}" for line in lines) or t("archive.empty"))
