"""Where a data set came from, and its split into a train and a validation part."""

import streamlit as st

from core.data import library
from core.data.library import Dataset
from core.data.split import split_dataset
from core.messages import Message
from core.project import Project
from pages.ui.dataset_add import attempt
from pages.ui.text import say, t


def versions_view(project: Project, dataset: Dataset) -> None:
    _origin(project, dataset)
    with st.container(border=True):
        st.markdown(f"**{t('dataset.split')}**")
        st.caption(t("dataset.split_intro", stem=dataset.path.stem))
        left, right = st.columns([4, 1], vertical_alignment="bottom")
        percent = left.slider(t("dataset.split_share"), 1, 50, 5, format="%d%%", key="dataset_split_percent")
        if right.button(t("dataset.split_go"), width="stretch", key="dataset_split_go"):
            attempt(lambda: split_dataset(project, dataset.path, percent).train, project)


def _origin(project: Project, dataset: Dataset) -> None:
    known = library.manifest(project, dataset.path)
    with st.container(border=True):
        st.markdown(f"**{t('dataset.origin')}**")
        if dataset.sha256:
            st.caption(t("dataset.version", sha256=dataset.sha256))
        if known is None:
            st.markdown(t("dataset.origin_unknown"))
            return
        if known["sha256"] != dataset.sha256 and dataset.sha256:
            st.warning(t("dataset.changed_since"), icon=":material/edit_note:")
        st.markdown(
            t(
                f"dataset.made_by.{known['made_by']}",
                source=f"`{known.get('source', '')}`",
                date=known["created_at"][:10],
            )
        )
        if known["made_by"] == "convert":
            st.markdown(t("dataset.rows_in_out", rows_in=f"{known['rows_in']:,}", rows_out=f"{known['rows_out']:,}"))
            for code, count in known["dropped"].items():
                st.markdown(
                    f"- {t('dataset.dropped', count=f'{count:,}')} {say(Message(f'dataset.reasons.{_reason(code)}'))} (`{code}`)"
                )


def _reason(code: str) -> str:
    """Group of a finding for the summary; the full sentence with its place is in the list of dropped rows."""
    if code in ("broken_json", "cut_off", "broken_csv", "cell_count", "not_utf8", "too_long", "too_deep"):
        return "unreadable"
    return "duplicate" if code == "duplicate_row" else "unusable"
