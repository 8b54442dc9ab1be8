"""DeepSpeed on the launch page: the choice, the JSON that the run will use, and its editor with the checks beside it."""

from dataclasses import dataclass
from hashlib import sha256

import streamlit as st

from core.config import deepspeed
from core.config.checks import gather
from core.config.checks_of_deepspeed import check_setting
from core.config.deepspeed import Setting
from core.config.json_places import read_object
from core.config.library import read_config
from core.config.source import ConfigSource
from core.errors import DanluError
from core.project import Project
from core.runs.train import TrainRequest, surroundings
from core.xtuner.command import DEEPSPEED_CHOICES
from pages.ui.audit import note
from pages.ui.findings import finding_card
from pages.ui.launch_views import choose_deepspeed_again
from pages.ui.text import show_error, t

_HEIGHT = 420
_ERROR = "launch_zero_error"
_NAME = "launch_zero_name"


def choose_deepspeed(project: Project, preset: str | None) -> str | None:
    """One of XTuner's settings, one of the project's, or none. `preset`: what a checkpoint was saved with."""
    choices = ["none", *DEEPSPEED_CHOICES, *deepspeed.list_own(project)]
    index = choices.index(preset or "none")
    chosen = st.selectbox(
        t("launch.deepspeed"),
        choices,
        index=index,
        key=f"launch_deepspeed_{index}",
        format_func=_name,
        help=t("deepspeed.help"),
    )
    if chosen in ("none", *DEEPSPEED_CHOICES):
        st.caption(t(f"launch.zero_help.{chosen}"))
    return None if chosen == "none" else chosen


def edit_deepspeed(project: Project, request: TrainRequest) -> bool:
    """The JSON with its checks, and the buttons that save it; False while there is an edit that is not saved."""
    if request.deepspeed is None:
        return True
    if error := st.session_state.pop(_ERROR, None):
        show_error(error)
    setting = deepspeed.find(project, request.deepspeed)
    st.caption(t("deepspeed.shows"))
    left, right = st.columns([6, 5])
    with left:
        key = f"launch_zero_json_{setting.name}_{sha256(setting.text.encode()).hexdigest()[:8]}"
        text = str(
            st.text_area(t("deepspeed.title"), setting.text, key=key, height=_HEIGHT, label_visibility="collapsed")
        )
    edit = _Edit(project, setting, text, key)
    with right:
        _buttons(edit)
        _findings(edit, request)
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
    if not edit.is_changed:
        if edit.setting.is_own:
            st.button(
                t("deepspeed.remove"),
                key="launch_zero_remove",
                icon=":material/delete:",
                on_click=_remove,
                args=(edit,),
            )
        return
    st.warning(t("deepspeed.changed"), icon=":material/edit_note:")
    name = str(
        st.text_input(
            t("deepspeed.name"), key=_NAME, placeholder=t("deepspeed.name_hint"), help=t("deepspeed.name_help")
        )
    ).strip()
    with st.container(horizontal=True):
        if edit.setting.is_own:
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
            type="secondary" if edit.setting.is_own else "primary",
        )  # fmt: skip
        st.button(
            t("deepspeed.discard"), key="launch_zero_discard", icon=":material/undo:", on_click=_discard, args=(edit,)
        )


def _findings(edit: _Edit, request: TrainRequest) -> None:
    """Of the text as it stands, saved or not."""
    try:
        edited = Setting(edit.setting.name, edit.text, read_object(edit.text), edit.setting.is_own)
    except DanluError as error:
        show_error(error)
        return
    source = ConfigSource(read_config(request.config))
    findings = check_setting(edited, source, gather(source, surroundings(edit.project, request)))
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


def _name(choice: str) -> str:
    return t(f"launch.zero.{choice}") if choice in ("none", *DEEPSPEED_CHOICES) else t("deepspeed.own", name=choice)
