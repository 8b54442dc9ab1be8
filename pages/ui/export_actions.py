"""What can be done with something that was delivered: each choice of its menu is a dialog that starts a job or removes it."""

from collections.abc import Callable

import streamlit as st

from core.checkpoints import modelscope_upload, upload
from core.checkpoints.deliverables import Deliverable, discard
from core.checkpoints.gguf_export import KINDS
from core.checkpoints.handover import fp8_target, gguf_target, start_fp8, start_gguf, start_upload, start_verify
from core.checkpoints.modelscope_upload import PACKAGE
from core.errors import DanluError
from core.project import Project
from pages.ui.audit import note
from pages.ui.export_quantize import quantize_dialog
from pages.ui.text import gib, show_error, t

_HUBS = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


def actions_of(project: Project, item: Deliverable) -> list[str]:
    """Names of what can be done with `item`, in the order of the menu."""
    found = ["gguf", "fp8", "quantize"] if item.is_model else []
    found += ["verify"] if item.kind == "merged" else []
    # A model that lies in final_model/ itself, as in the guide, is not ours to remove or send.
    return found + (["upload", "remove"] if item.path.parent != project.root else [])


def open_action(name: str, project: Project, item: Deliverable) -> None:
    """Show the dialog of one choice; a check starts at once."""
    if name == "verify":
        _run(lambda: start_verify(project, item.path), "start", f"verify {item.name}")
    else:
        dialogs = {"gguf": _gguf, "fp8": _fp8, "quantize": quantize_dialog, "upload": _upload, "remove": _remove}
        dialogs[name](project, item)


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
        _run(lambda: start_gguf(project, item.path, kind), "export", f"{item.name} {kind}")


@st.dialog(":material/compress: FP8")
def _fp8(project: Project, item: Deliverable) -> None:
    st.markdown(t("export.fp8_intro"))
    target = fp8_target(project, item.path)
    st.caption(t("export.target", path=str(target.relative_to(project.root))))
    if st.button(t("export.fp8_start"), key="export_fp8_start", type="primary", width="stretch"):
        _run(lambda: start_fp8(project, item.path), "export", f"{item.name} fp8")


@st.dialog(":material/cloud_upload: Hugging Face · ModelScope")
def _upload(project: Project, item: Deliverable) -> None:
    hub = st.segmented_control(
        t("export.hub"), list(_HUBS), default="huggingface", format_func=_HUBS.get, key="export_hub", required=True
    )
    obstacle = _upload_obstacle(str(hub))
    if obstacle:
        st.warning(t(obstacle, package=PACKAGE), icon=":material/key_off:")
    repository = st.text_input(
        t("export.repository"), key="export_repository", placeholder="ada/my-model", help=t("export.repository_help")
    )
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
        disabled=not repository.strip() or obstacle is not None,
    ):
        named = (base_model or "").strip() or None
        _run(
            lambda: start_upload(project, item, repository, is_private=is_private, base_model=named, hub=str(hub)),
            "upload",
            f"{item.name} → {repository.strip()}",
        )


def _upload_obstacle(hub: str) -> str | None:
    """Key of the words for what stands before an upload."""
    if hub == "huggingface":
        return None if upload.has_token() else "export.upload_no_token"
    if not modelscope_upload.is_installed():
        return "export.upload_no_modelscope"
    return None if modelscope_upload.has_token() else "export.upload_no_modelscope_token"


@st.dialog(" ")
def _remove(project: Project, item: Deliverable) -> None:
    st.markdown(t("export.confirm_remove", name=f"{item.path.parent.name}/{item.name}", size=gib(item.size_bytes)))
    if st.button(t("export.actions.remove"), key="export_remove_confirmed", type="primary"):
        _run(lambda: discard(project, item.path), "delete", f"{item.path.parent.name}/{item.name}")


def _run(start: Callable[[], object], action: str, target: str) -> None:
    """Do it, write down who did, and show the page anew; or show why it cannot be done."""
    try:
        start()
    except DanluError as error:
        show_error(error)
    else:
        note(action, target)
        st.rerun()
