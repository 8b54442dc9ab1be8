"""Everything that was delivered, with its origin and its check; chat with it, download it, remove it."""

from collections.abc import Sequence

import streamlit as st

from core.checkpoints.deliverables import Deliverable, zip_folder
from core.project import Project
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.export_actions import actions_of, open_action
from pages.ui.export_quantize import show_quantized
from pages.ui.text import gib, t

_LARGEST_DOWNLOAD_BYTES = 512 * 2**20
_ICONS = {
    "adapter": ":material/extension:",
    "merged": ":material/deployed_code:",
    "full": ":material/deployed_code:",
    "gguf": ":material/package_2:",
    "fp8": ":material/compress:",
    "awq": ":material/grid_4x4:",
    "gptq": ":material/grid_4x4:",
}


def deliverables_list(project: Project, items: Sequence[Deliverable]) -> None:
    """Newest first."""
    st.subheader(t("export.delivered"))
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
            st.caption(" · ".join(part for part in (_origin(item), item.dtype, gib(item.size_bytes)) if part))
        with actions:
            _actions(project, item, key)
        if item.verified:
            with st.expander(t("export.figures")):
                _figures(item.verified)
        if item.quantized:
            with st.expander(t("quantize.figures")):
                show_quantized(item.path, item.quantized)


def _origin(item: Deliverable) -> str:
    if item.run:
        return t("export.origin", run=item.run, checkpoint=item.checkpoint)
    return t("export.combined_from", names=" + ".join(item.sources)) if item.sources else t("export.made_elsewhere")


def _actions(project: Project, item: Deliverable, key: str) -> None:
    first, more = st.columns([3, 2])
    if item.is_model:
        if first.button(t("export.chat"), key=f"export_chat_{key}", icon=":material/forum:", width="stretch"):
            st.switch_page(shell.PAGES["chat"], query_params={"model": str(item.path)})
    elif item.size_bytes <= _LARGEST_DOWNLOAD_BYTES:
        first.download_button(
            t("export.download"),
            data=lambda folder=item.path: zip_folder(folder),
            file_name=f"{item.name}.zip",
            mime="application/zip",
            key=f"export_zip_{key}",
            icon=":material/download:",
            on_click=lambda: note("export", f"{item.name}.zip"),
            width="stretch",
        )
    chosen = more.menu_button(
        t("export.more"),
        actions_of(project, item),
        format_func=lambda name: t(f"export.actions.{name}"),
        key=f"export_more_{key}",
        width="stretch",
    )
    if chosen:
        open_action(chosen, project, item)


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
