"""Everything that was delivered, with its origin and its check; chat with it, download it, remove it."""

import streamlit as st

from core.checkpoints.deliverables import Deliverable, discard, list_deliverables, zip_folder
from core.errors import DanluError
from core.project import Project
from pages.ui import shell
from pages.ui.text import gib, show_error, t

_LARGEST_DOWNLOAD_BYTES = 512 * 2**20
_ICONS = {"adapter": ":material/extension:", "merged": ":material/deployed_code:", "full": ":material/deployed_code:"}


def deliverables_list(project: Project) -> None:
    """Newest first."""
    st.subheader(t("export.delivered"))
    items = list_deliverables(project)
    if not items:
        st.caption(t("export.nothing_delivered"))
    for item in items:
        _row(project, item)


def _row(project: Project, item: Deliverable) -> None:
    key = f"{item.path.parent.name}_{item.name}"
    with st.container(border=True):
        words, actions = st.columns([3, 2], vertical_alignment="center")
        with words:
            badge = f" :green-badge[:material/verified: {t('export.verified')}]" if item.is_verified else ""
            kind = t(f"export.kinds.{item.kind}")
            st.markdown(
                f"{_ICONS.get(item.kind, ':material/folder:')} **{item.path.parent.name}/{item.name}** · {kind}{badge}"
            )
            origin = (
                t("export.origin", run=item.run, checkpoint=item.checkpoint) if item.run else t("export.made_elsewhere")
            )
            st.caption(" · ".join(part for part in (origin, item.dtype, gib(item.size_bytes)) if part))
        with actions:
            buttons = st.columns([3, 2])
            if item.is_model:
                if buttons[0].button(
                    t("export.chat"), key=f"export_chat_{key}", icon=":material/forum:", width="stretch"
                ):
                    st.switch_page(shell.PAGES["chat"], query_params={"model": str(item.path)})
            elif item.size_bytes <= _LARGEST_DOWNLOAD_BYTES:
                buttons[0].download_button(
                    t("export.download"),
                    data=lambda folder=item.path: zip_folder(folder),
                    file_name=f"{item.name}.zip",
                    mime="application/zip",
                    key=f"export_zip_{key}",
                    icon=":material/download:",
                    on_click="ignore",
                    width="stretch",
                )
            if item.path.parent != project.root and buttons[1].button(
                t("export.remove"), key=f"export_remove_{key}", icon=":material/delete:", width="stretch"
            ):
                _confirm_removal(project, item)
        if item.verified:
            with st.expander(t("export.figures")):
                _figures(item.verified)


def _figures(verified: dict[str, object]) -> None:
    """The check in numbers, and the answers of both models side by side."""
    lines = [
        t("export.layers_checked", tensors=verified.get("tensors"), changed=verified.get("changed_tensors")),
        t("export.layer_error", error=verified.get("layer_error"), tolerance=verified.get("layer_tolerance")),
    ]
    if "logit_error" in verified:
        lines.append(
            t(
                "export.logit_error",
                error=verified["logit_error"],
                tolerance=verified["logit_tolerance"],
                rounding=verified["rounding_error"],
                agreement=verified["top1_agreement"],
            )
        )
    st.markdown("  \n".join(lines))
    answers = verified.get("answers")
    if isinstance(answers, list):
        columns = {
            "prompt": t("export.prompt"),
            "base_adapter": t("export.base_adapter"),
            "merged": t("export.kinds.merged"),
        }
        st.table([{columns[name]: answer.get(name) for name in columns} for answer in answers])


@st.dialog(" ")
def _confirm_removal(project: Project, item: Deliverable) -> None:
    st.markdown(t("export.confirm_remove", name=f"{item.path.parent.name}/{item.name}", size=gib(item.size_bytes)))
    if st.button(t("export.remove"), key="export_remove_confirmed", type="primary"):
        try:
            discard(project, item.path)
        except DanluError as error:
            show_error(error)
        else:
            st.rerun()
