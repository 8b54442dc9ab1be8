"""Where a data set came from, and its split into a train and a validation part."""

from pathlib import Path

import streamlit as st

from core.data import library
from core.data.library import Dataset
from core.data.mix import MOST_PERCENT, join, mix
from core.data.split import split_dataset
from core.messages import Message
from core.project import Project
from core.runs.launch import start_job
from pages.ui.audit import note
from pages.ui.dataset_add import attempt
from pages.ui.text import say, t


def versions_view(project: Project, dataset: Dataset) -> None:
    _origin(project, dataset)
    with st.container(border=True):
        st.markdown(f"**{t('dataset.split')}**")
        st.caption(t("dataset.split_intro", stem=dataset.path.stem))
        left, right = st.columns([4, 1], vertical_alignment="bottom")
        percent = left.slider(
            t("dataset.split_share"),
            1,
            50,
            5,
            format="%d%%",
            key="dataset_split_percent",
            help=t("dataset.split_share_help"),
        )
        if right.button(t("dataset.split_go"), width="stretch", key="dataset_split_go"):
            attempt(lambda: split_dataset(project, dataset.path, percent).train, project)
    _mix_form(project, dataset)


def _mix_form(project: Project, dataset: Dataset) -> None:
    """Other data sets of the project: a share of one mixed in, or several joined."""
    others = {
        str(path.relative_to(project.data)): path
        for path in (other.path for other in library.list_datasets(project))
        if path != dataset.path
    }
    with st.container(border=True):
        st.markdown(f"**{t('dataset.mix')}**")
        st.caption(t("dataset.mix_intro", stem=dataset.path.stem) if others else t("dataset.mix_nothing"))
        if not others:
            return
        way = st.segmented_control(
            t("dataset.mix"),
            ["mix", "join"],
            default="mix",
            format_func={name: t(f"dataset.mix_ways.{name}") for name in ("mix", "join")}.__getitem__,
            key="dataset_mix_way",
            label_visibility="collapsed",
            required=True,
        )
        left, middle, right = st.columns([3, 3, 1], vertical_alignment="bottom")
        if way == "join":
            chosen = left.multiselect(
                t("dataset.mix_others"), others, key="dataset_join_others", help=t("dataset.mix_others_help")
            )
            if right.button(t("dataset.mix_go"), width="stretch", key="dataset_join_go", disabled=not chosen):
                _join(project, dataset, [others[name] for name in chosen])
            return
        other = left.selectbox(
            t("dataset.mix_other"), others, key="dataset_mix_other", help=t("dataset.mix_other_help")
        )
        percent = middle.slider(
            t("dataset.mix_share"), 1, MOST_PERCENT, 20, format="%d%%", key="dataset_mix_percent",
            help=t("dataset.mix_help"),
        )  # fmt: skip
        if right.button(t("dataset.mix_go"), width="stretch", key="dataset_mix_go"):
            _mix(project, dataset, others[other], percent)


def _mix(project: Project, dataset: Dataset, other: Path, percent: int) -> None:
    if dataset.path.stat().st_size + other.stat().st_size <= library.INLINE_BYTES:
        attempt(lambda: mix(project, dataset.path, other, percent), project)
        return
    arguments = {"project": str(project.root), "path": str(dataset.path), "general": str(other), "percent": percent}
    start_job(project, "core.data.mix:mix_job", kind="data_convert", title=dataset.name, arguments=arguments)
    note("start", f"mix {dataset.name}")
    st.rerun()


def _join(project: Project, dataset: Dataset, others: list[Path]) -> None:
    paths, name = [dataset.path, *others], f"{dataset.path.stem}_joined"
    if sum(path.stat().st_size for path in paths) <= library.INLINE_BYTES:
        attempt(lambda: join(project, paths, name), project)
        return
    arguments = {"project": str(project.root), "paths": [str(path) for path in paths], "name": name}
    start_job(project, "core.data.mix:join_job", kind="data_convert", title=dataset.name, arguments=arguments)
    note("start", f"join {dataset.name}")
    st.rerun()


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
        if "rows_in" in known:
            st.markdown(t("dataset.rows_in_out", rows_in=f"{known['rows_in']:,}", rows_out=f"{known['rows_out']:,}"))
            for code, count in known.get("dropped", {}).items():
                st.markdown(
                    f"- {t('dataset.dropped', count=f'{count:,}')} {say(Message(f'dataset.reasons.{_reason(code)}'))} (`{code}`)"
                )


def _reason(code: str) -> str:
    """Group of a finding for the summary; the full sentence with its place is in the list of dropped rows."""
    if code in ("broken_json", "cut_off", "broken_csv", "cell_count", "not_utf8", "too_long", "too_deep"):
        return "unreadable"
    return "duplicate" if code == "duplicate_row" else "unusable"
