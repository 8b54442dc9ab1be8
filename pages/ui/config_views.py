"""The other views of a config: the guide's edits, the source, the changes, and the checks beside them."""

from dataclasses import replace
from pathlib import Path

import streamlit as st

from core.config import edits, library, recipes
from core.config.checks import Surroundings, apply_fix, check, fix_all, gather
from core.config.facts import DataFacts, ModelFacts, read_data, read_model
from core.config.findings import Finding, Severity
from core.config.library import Draft
from core.config.load import load_values
from core.config.source import ConfigSource, diff
from core.errors import DanluError, InputError
from core.project import Project
from pages.ui.config_draft import change, change_text
from pages.ui.text import say, show_error, t

_ICONS = {
    Severity.ERROR: ":red[:material/error:]",
    Severity.WARNING: ":orange[:material/warning:]",
    Severity.ADVICE: ":blue[:material/info:]",
}


def guide_view(project: Project, name: str, source: ConfigSource) -> None:
    """The guide's edits line by line, with what each would change here."""
    recipe = st.selectbox(
        t("config.choose_recipe"),
        list(recipes.RECIPES),
        format_func=lambda key: t(f"config.recipes.{key}"),
        key="config_recipe",
    )
    model, data = _own(source)
    steps = recipes.RECIPES[recipe](model, data)
    if model is None or data is None:
        st.caption(t("config.recipe_needs"))
    st.button(
        t("config.recipe_apply"),
        type="primary",
        icon=":material/playlist_add_check:",
        key="config_recipe_apply",
        on_click=lambda: change(project, name, lambda old: recipes.apply(old, steps)),
    )
    for step in recipes.show(source, steps):
        st.markdown(say(step.why))
        if step.diff:
            lines = [line for line in step.diff.splitlines() if not line.startswith(("---", "+++", "@@"))]
            st.code("\n".join(lines), language="diff")
        else:
            st.caption(t("config.recipe_nothing"))


def _own(source: ConfigSource) -> tuple[ModelFacts | None, DataFacts | None]:
    """Facts of the local model and data file the config names now."""
    model_path, files = source.get("pretrained_model_name_or_path", None), edits.data_files(source)
    try:
        model = read_model(Path(model_path)) if isinstance(model_path, str) else None
    except InputError:
        model = None
    try:
        data = read_data(Path(files[0])) if files else None
    except InputError:
        data = None
    return model, data


def source_view(project: Project, name: str, draft: Draft) -> None:
    """The text itself. What does not parse is kept, with its place; the last good version stays in use."""
    if draft.broken_text is not None:
        _show_broken(project, draft, draft.broken_text)
    key = f"config_source_{name}"
    st.session_state[key] = draft.text if draft.broken_text is None else draft.broken_text
    st.text_area(
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
        st.error(
            t("config.broken", line=line, column=column, reason=error.params.get("reason", error.code)),
            icon=":material/error:",
        )
        lines = text.splitlines()
        if 0 < line <= len(lines):
            st.code(f"{lines[line - 1]}\n{' ' * (column - 1)}^", language="python")
    st.button(
        t("config.drop_broken"),
        key="config_drop_broken",
        on_click=lambda: library.keep_draft(project, replace(draft, broken_text=None)),
    )


def changes_view(name: str, draft: Draft) -> None:
    """What differs from XTuner's original, or from the file."""
    bases = {"against_original": library.original(name), "against_saved": draft.saved_text}
    names = [key for key, text in bases.items() if text is not None]
    base = st.segmented_control(
        t("config.against"),
        names,
        default=names[0],
        format_func=lambda key: t(f"config.{key}"),
        key=f"config_against_{name}",
        required=True,
    )
    text = diff(bases[str(base)] or "", draft.text, name=f"{name}.py")
    if text:
        st.code(text, language="diff", height=480)
    else:
        st.caption(t("config.no_changes"))


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
        _finding(project, name, finding, number)
    if st.button(
        t("config.try_load"),
        icon=":material/play_circle:",
        key="config_try_load",
        help=t("config.try_load_help"),
        width="stretch",
    ):
        _try_load(source)


def _finding(project: Project, name: str, finding: Finding, number: int) -> None:
    place = f" :gray[{t('config.checks_line', line=finding.line)}]" if finding.line else ""
    with st.container(border=True):
        st.markdown(f"{_ICONS[finding.severity]} {say(finding.message)}{place}")
        if finding.fix_message is not None:
            st.button(
                say(finding.fix_message),
                key=f"config_fix_{finding.code}_{number}",
                on_click=lambda: change(project, name, lambda old: apply_fix(old, finding)),
            )


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
