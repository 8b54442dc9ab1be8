"""DeepSpeed on the launch page: the choice, the JSON that the run will use, and its editor with the checks beside it."""

from dataclasses import dataclass
from hashlib import sha256

import streamlit as st

from core.config import deepspeed
from core.config.checks_of_deepspeed import check_setting
from core.config.deepspeed import Setting
from core.config.json_places import read_object
from core.errors import DanluError
from core.project import Project
from core.runs.start import Start
from core.xtuner.command import DEEPSPEED_CHOICES
from pages.ui.audit import note
from pages.ui.code_box import code_box
from pages.ui.findings import finding_card
from pages.ui.launch_resume import Resume
from pages.ui.launch_views import choose_deepspeed_again
from pages.ui.text import say, show_error, t

_HEIGHT = 420
_ERROR = "launch_zero_error"
_NAME = "launch_zero_name"


def choose_deepspeed(project: Project, resume: Resume) -> str | None:
    """One of XTuner's settings, one of the project's, the copy of the run to go on from, or none. What that run used is chosen first."""
    preset, key = resume.deepspeed, f"launch_deepspeed_{resume.checkpoint or 'new'}"
    choices = ["none", *DEEPSPEED_CHOICES, *deepspeed.list_own(project)]
    for name in (preset.name if preset else None, st.session_state.get(key)):
        if name and name not in choices and deepspeed.is_copy(name):
            choices.append(name)
    chosen = st.selectbox(
        t("launch.deepspeed"),
        choices,
        index=choices.index(preset.name if preset else "none"),
        key=key,
        format_func=deepspeed_label,
        help=t("deepspeed.help"),
    )
    if preset is not None:
        st.caption(say(preset.why))
    if chosen in ("none", *DEEPSPEED_CHOICES):
        st.caption(t(f"launch.zero_help.{chosen}"))
    return None if chosen == "none" else chosen


def edit_deepspeed(project: Project, start: Start) -> bool:
    """The JSON with its checks, and the buttons that save it; False while there is an edit that is not saved."""
    setting = start.around.setting
    if setting is None:
        return True
    if error := st.session_state.pop(_ERROR, None):
        show_error(error)
    st.caption(t("deepspeed.shows"))
    left, right = st.columns([6, 5])
    with left:
        key = f"launch_zero_json_{setting.name}_{sha256(setting.text.encode()).hexdigest()[:8]}"
        text = code_box(t("deepspeed.title"), setting.text, key=key, height=_HEIGHT, label_visibility="collapsed")
    edit = _Edit(project, setting, text, key)
    with right:
        _buttons(edit)
        _findings(edit, start)
    return not edit.is_changed


@dataclass(frozen=True, slots=True)
class _Edit:
    project: Project
    setting: Setting
    text: str
    key: str

    @property
    def is_changed(self) -> bool:
        return self.text != self.setting.text


def _buttons(edit: _Edit) -> None:
    is_copy = deepspeed.is_copy(edit.setting.name)
    if not edit.is_changed and not is_copy:
        if edit.setting.is_saved:
            st.button(
                t("deepspeed.remove"),
                key="launch_zero_remove",
                icon=":material/delete:",
                on_click=_remove,
                args=(edit,),
            )
        return
    if edit.is_changed:
        st.warning(t("deepspeed.changed"), icon=":material/edit_note:")
    name = str(
        st.text_input(
            t("deepspeed.name"), key=_NAME, placeholder=t("deepspeed.name_hint"), help=t("deepspeed.name_help")
        )
    ).strip()
    with st.container(horizontal=True):
        if edit.setting.is_saved:
            st.button(
                t("deepspeed.save"),
                type="primary",
                key="launch_zero_save",
                icon=":material/save:",
                on_click=_save,
                args=(edit,),
            )
        st.button(
            t("deepspeed.save_as"), key="launch_zero_save_as", icon=":material/save_as:", on_click=_save_as, args=(edit, name),
            type="primary" if edit.is_changed and not edit.setting.is_saved else "secondary",
        )  # fmt: skip
        if edit.is_changed:
            st.button(
                t("deepspeed.discard"),
                key="launch_zero_discard",
                icon=":material/undo:",
                on_click=_discard,
                args=(edit,),
            )


def _findings(edit: _Edit, start: Start) -> None:
    """Of the text as it stands, saved or not."""
    try:
        edited = Setting(edit.setting.name, edit.text, read_object(edit.text), edit.setting.is_own)
    except DanluError as error:
        show_error(error)
        return
    findings = check_setting(edited, start.source, start.context)
    if not findings:
        st.caption(f":green[:material/check_circle: {t('deepspeed.fine')}]")
    for number, finding in enumerate(findings):
        finding_card(finding, key=f"launch_zero_{number}", on_fix=None)


def _save(edit: _Edit) -> None:
    _keep(edit, edit.setting.name, before=edit.setting.text)


def _save_as(edit: _Edit, name: str) -> None:
    _keep(edit, name, before=None)


def _keep(edit: _Edit, name: str, *, before: str | None) -> None:
    """An error is shown on the next run, beside the text that caused it."""
    try:
        deepspeed.save(edit.project, name, edit.text, before=before)
    except DanluError as error:
        st.session_state[_ERROR] = error
        return
    choose_deepspeed_again(name)
    st.session_state[_NAME] = ""
    st.toast(t("deepspeed.saved", name=name), icon=":material/check_circle:")


def _discard(edit: _Edit) -> None:
    st.session_state[edit.key] = edit.setting.text


def _remove(edit: _Edit) -> None:
    deepspeed.remove(edit.project, edit.setting.name)
    note("delete", f"deepspeed {edit.setting.name}")
    choose_deepspeed_again(edit.setting.zero.choice if edit.setting.zero.choice in DEEPSPEED_CHOICES else "none")
    st.toast(t("deepspeed.removed", name=edit.setting.name), icon=":material/delete:")


def deepspeed_label(choice: str) -> str:
    """What a choice is called: `none`, one of XTuner's, one of the project's, a run's copy."""
    if choice in ("none", *DEEPSPEED_CHOICES):
        return t(f"launch.zero.{choice}")
    if deepspeed.is_copy(choice):
        return t("deepspeed.of_run", run=deepspeed.run_of_copy(choice))
    return t("deepspeed.own", name=choice)
