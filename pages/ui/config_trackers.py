"""Services that a config's runs report to beside the app's own curves: chosen among those whose package is installed."""

import os
from functools import partial
from pathlib import Path

import streamlit as st

from core.config.source import ConfigSource
from core.config.trackers import TRACKERS, Choice, read_trackers, set_trackers
from core.environment.interpreters import installed_versions, training_python
from core.errors import DanluError
from core.project import Project
from pages.ui.config_draft import change
from pages.ui.text import t


def choose_trackers(project: Project, name: str, source: ConfigSource) -> None:
    """Nothing but a line where the config has a visualizer of its own."""
    choice = read_trackers(source)
    if choice.is_own:
        st.caption(t("trackers.own"))
        return
    installed = _installed(project)
    present = [tracker.key for tracker in TRACKERS if tracker.package in installed or tracker in choice.trackers]
    names = {tracker.key: tracker.name for tracker in TRACKERS}
    missing = [tracker.package for tracker in TRACKERS if tracker.package not in installed]
    key, offline_key = f"config_trackers_{name}", f"config_trackers_offline_{name}"
    st.session_state[key] = [tracker.key for tracker in choice.trackers]
    st.session_state[offline_key] = choice.is_offline

    def put() -> None:
        chosen, is_offline = st.session_state[key], bool(st.session_state.get(offline_key))
        change(project, name, partial(set_trackers, keys=chosen, is_offline=is_offline))

    st.multiselect(
        t("trackers.label"), present, format_func=names.__getitem__, key=key, on_change=put,
        placeholder=t("trackers.none"), help=t("trackers.help"), disabled=not present,
    )  # fmt: skip
    if any(tracker.offline for tracker in choice.trackers):
        st.toggle(t("trackers.offline"), key=offline_key, on_change=put, help=t("trackers.offline_help"))
    _notes(choice, missing, installed)


def _notes(choice: Choice, missing: list[str], installed: set[str]) -> None:
    for tracker in choice.trackers:
        if tracker.package not in installed:
            st.warning(t("trackers.gone", name=tracker.name, package=tracker.package), icon=":material/warning:")
        elif tracker.secrets and not any(map(os.environ.get, tracker.secrets)):
            is_needed = not (choice.is_offline and tracker.offline)
            if is_needed:
                st.caption(t(f"trackers.no_{tracker.key}", variable=tracker.secrets[0]))
    if missing:
        st.caption(t("trackers.missing", packages=", ".join(missing)))


def _installed(project: Project) -> set[str]:
    try:
        return set(installed_versions(Path(training_python(project))))
    except DanluError:
        return set()
