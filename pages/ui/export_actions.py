"""What can be done with something that was delivered: each choice of its menu is a dialog that starts a job or removes it."""

from collections.abc import Callable

import streamlit as st

from core.checkpoints.deliverables import Deliverable, discard
from core.checkpoints.gguf_export import KINDS
from core.checkpoints.handover import gguf_target, start_gguf, start_upload, start_verify
from core.checkpoints.upload import has_token
from core.errors import DanluError
from core.project import Project
from pages.ui.text import gib, show_error, t


def actions_of(project: Project, item: Deliverable) -> list[str]:
    """Names of what can be done with `item`, in the order of the menu."""
    found = ["gguf"] if item.is_model else []
    found += ["verify"] if item.kind == "merged" else []
    # A model that lies in final_model/ itself, as in the guide, is not ours to remove or send.
    return found + (["upload", "remove"] if item.path.parent != project.root else [])


def open_action(name: str, project: Project, item: Deliverable) -> None:
    """Show the dialog of one choice; a check starts at once."""
    if name == "verify":
        _run(lambda: start_verify(project, item.path))
    else:
        {"gguf": _gguf, "upload": _upload, "remove": _remove}[name](project, item)


@st.dialog(":material/package_2: GGUF")
def _gguf(project: Project, item: Deliverable) -> None:
    st.markdown(t("export.gguf_intro"))
    kind = st.radio(
        t("export.gguf_kind"),
        KINDS,
        index=1,
        key="export_gguf_kind",
        captions=[t(f"export.gguf_kinds.{name}") for name in KINDS],
    )
    target = gguf_target(project, item.path, kind)
    st.caption(t("export.target", path=str(target.relative_to(project.root))))
    if st.button(t("export.gguf_start"), key="export_gguf_start", type="primary", width="stretch"):
        _run(lambda: start_gguf(project, item.path, kind))


@st.dialog(":material/cloud_upload: Hugging Face")
def _upload(project: Project, item: Deliverable) -> None:
    if not has_token():
        st.warning(t("export.upload_no_token"), icon=":material/key_off:")
    repository = st.text_input(t("export.repository"), key="export_repository", placeholder="ada/my-model")
    base_model = None
    if item.kind == "adapter":
        base_model = st.text_input(
            t("export.hub_base"),
            key="export_hub_base",
            placeholder="internlm/internlm2-chat-7b",
            help=t("export.hub_base_help"),
        )
    is_private = st.toggle(t("export.private"), value=True, key="export_private")
    st.caption(t("export.upload_note", size=gib(item.size_bytes)))
    if st.button(
        t("export.upload_start"),
        key="export_upload_start",
        type="primary",
        width="stretch",
        disabled=not repository.strip() or not has_token(),
    ):
        _run(
            lambda: start_upload(
                project, item, repository, is_private=is_private, base_model=(base_model or "").strip() or None
            )
        )


@st.dialog(" ")
def _remove(project: Project, item: Deliverable) -> None:
    st.markdown(t("export.confirm_remove", name=f"{item.path.parent.name}/{item.name}", size=gib(item.size_bytes)))
    if st.button(t("export.actions.remove"), key="export_remove_confirmed", type="primary"):
        _run(lambda: discard(project, item.path))


def _run(start: Callable[[], object]) -> None:
    """Do it and show the page anew, or show why it cannot be done."""
    try:
        start()
    except DanluError as error:
        show_error(error)
    else:
        st.rerun()
