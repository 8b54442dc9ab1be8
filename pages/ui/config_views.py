"""The other views of a config: the source, the changes, and the checks beside them."""

from dataclasses import replace

import streamlit as st

from core.config import library
from core.config.checks import Surroundings, apply_fix, check, fix_all, gather
from core.config.compare import compare
from core.config.library import Draft
from core.config.load import load_values
from core.config.source import ConfigSource, diff
from core.errors import DanluError, InputError
from core.project import Project
from pages.ui.code_box import code_box
from pages.ui.config_draft import change, change_text
from pages.ui.findings import finding_card
from pages.ui.text import show_error, t


def source_view(project: Project, name: str, draft: Draft) -> None:
    """The text itself. What does not parse is kept, with its place; the last good version stays in use."""
    if draft.broken_text is not None:
        _show_broken(project, draft, draft.broken_text)
    key = f"config_source_{name}"
    st.session_state[key] = draft.text if draft.broken_text is None else draft.broken_text
    code_box(
        t("config.tab_source"),
        height=520,
        key=key,
        help=t("config.source_help"),
        on_change=lambda: change_text(project, name, st.session_state[key]),
    )


def _show_broken(project: Project, draft: Draft, text: str) -> None:
    try:
        ConfigSource(text)
    except InputError as error:
        line, column = int(error.params.get("line", 1)), int(error.params.get("column", 1))
        words = "config.broken" if _parses(draft.text) else "config.broken_file"
        reason = error.params.get("reason", error.code)
        st.error(t(words, line=line, column=column, reason=reason), icon=":material/error:")
        lines = text.splitlines()
        if 0 < line <= len(lines):
            st.code(f"{lines[line - 1]}\n{' ' * (column - 1)}^", language="python")
    if _parses(draft.text):
        st.button(
            t("config.drop_broken"),
            key="config_drop_broken",
            on_click=lambda: library.keep_draft(project, replace(draft, broken_text=None)),
        )


def _parses(text: str) -> bool:
    """Whether there is a good version: a file may have come broken into the project."""
    try:
        ConfigSource(text)
    except InputError:
        return False
    return True


def changes_view(project: Project, name: str, draft: Draft) -> None:
    """What differs from XTuner's original or from the file, line by line; from another config by what training reads."""
    bases = {"against_original": library.original(name), "against_saved": draft.saved_text}
    others = [config.name for config in library.list_configs(project) if config.name != name]
    names = [key for key, text in bases.items() if text is not None] + (["against_other"] if others else [])
    base = st.segmented_control(
        t("config.against"),
        names,
        default=names[0],
        format_func=lambda key: t(f"config.{key}"),
        key=f"config_against_{name}",
        required=True,
    )
    if base == "against_other":
        _against_other(project, draft, others)
        return
    text = diff(bases[str(base)] or "", draft.text, name=f"{name}.py")
    if text:
        st.code(text, language="diff", height=480)
    else:
        st.caption(t("config.no_changes"))


def _against_other(project: Project, draft: Draft, others: list[str]) -> None:
    other = st.selectbox(t("config.other_config"), others, key="config_other", help=t("config.other_config_help"))
    found = compare(ConfigSource(draft.text), ConfigSource(library.open_draft(project, other).text))
    st.caption(t("config.compare_note"))
    if not found:
        st.caption(t("config.compare_same"))
        return
    columns = {"path": t("config.compare_path"), "left": draft.name, "right": other}
    rows = [{"path": one.path, "left": one.left or "—", "right": one.right or "—"} for one in found]
    st.dataframe([{columns[key]: value for key, value in row.items()} for row in rows], hide_index=True)


def checks_view(project: Project, name: str, source: ConfigSource, around: Surroundings) -> None:
    """Everything that is wrong or odd, each with its fix."""
    findings = check(source, gather(source, around))
    fixable = [finding for finding in findings if finding.fix is not None]
    st.markdown(f"**{t('config.checks_title')}**")
    if not findings:
        st.success(t("config.checks_good"), icon=":material/check_circle:")
    if len(fixable) > 1:
        st.button(
            t("config.fix_all", count=len(fixable)),
            icon=":material/auto_fix_high:",
            key="config_fix_all",
            width="stretch",
            on_click=lambda: change(project, name, lambda old: fix_all(old, around)),
        )
    for number, finding in enumerate(findings):
        mends = (lambda one: change(project, name, lambda old: apply_fix(old, one))) if finding.fix else None
        finding_card(finding, key=f"config_fix_{finding.code}_{number}", on_fix=mends)
    if st.button(
        t("config.try_load"),
        icon=":material/play_circle:",
        key="config_try_load",
        help=t("config.try_load_help"),
        width="stretch",
    ):
        _try_load(source)


def _try_load(source: ConfigSource) -> None:
    with st.spinner(t("config.try_loading")):
        try:
            values = load_values(source.text)
        except DanluError as error:
            show_error(error)
            return
    optimizer = values.get("optim_wrapper", {}).get("optimizer", {})
    model = values.get("model", {}).get("llm", {}).get("pretrained_model_name_or_path", "?")
    st.success(t("config.loads", model=model, lr=optimizer.get("lr", "?")), icon=":material/check_circle:")
