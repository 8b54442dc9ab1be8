"""The bar on top of the launch page: what to train, the button that starts, and in one line what the tabs below say in full."""

from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from core.config.findings import Finding, Severity
from core.config.library import list_configs, read_config
from core.config.source import ConfigSource
from core.errors import DanluError
from core.project import Project
from core.runs.directory import RunDirectory
from pages.ui import shell
from pages.ui.launch_views import facts
from pages.ui.text import say, show_error, t

_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "orange", Severity.ADVICE: "blue"}


@dataclass(frozen=True, slots=True)
class Bar:
    """What was chosen in it, and the places that are filled when everything below is known."""

    config: Path
    name: str
    start: DeltaGenerator
    summary: DeltaGenerator
    trouble: DeltaGenerator


def draw_bar(project: Project) -> Bar:
    """Config, name, and room for the rest. Without a config it links to where one is made, and the page ends here."""
    configs = {config.name: config.path for config in list_configs(project)}
    if not configs:
        shell.missing(t("launch.no_config"), "config")
        st.stop()
    with st.container(border=True):
        left, middle, right = st.columns([4, 3, 2], vertical_alignment="bottom")
        config = configs[left.selectbox(t("launch.config"), configs, key="launch_config", help=t("launch.config_help"))]
        name = middle.text_input(
            t("launch.name"), key="launch_name", placeholder=t("launch.name_hint"), help=t("launch.name_help")
        )
        start = right.empty()
        summary = st.empty()
        facts(ConfigSource(read_config(config)))
    return Bar(config, name.strip(), start, summary, st.container())


def fill_bar(bar: Bar, active: list[RunDirectory], findings: list[Finding], *badges: str | None) -> None:
    """Counts of the checks, time and memory; and what is wrong first of all. `active`: runs that wait or run."""
    bar.summary.markdown(" ".join([*_counts(findings), *(badge for badge in badges if badge)]))
    if findings and findings[0].severity is Severity.ERROR:
        bar.trouble.error(say(findings[0].message), icon=":material/error:")
    if active:
        names = ", ".join(run.id for run in active)
        bar.trouble.warning(t("launch.running", names=names), icon=":material/hourglass:")


def show_trouble(bar: Bar, error: DanluError, findings: list[Finding]) -> None:
    """Why it cannot start, unless a check says so already."""
    if not any(finding.severity is Severity.ERROR for finding in findings):
        with bar.trouble:
            show_error(error)


def start_button(bar: Bar, *, can_start: bool) -> bool:
    """Whether it was pressed."""
    return bar.start.button(
        t("launch.start"), type="primary", icon=":material/rocket_launch:", key="launch_start", width="stretch",
        disabled=not can_start,
    )  # fmt: skip


def _counts(findings: list[Finding]) -> list[str]:
    """`2 errors`, `1 warning`; advice counts too, and nothing found is good news."""
    if not findings:
        return [f":green-badge[:material/check_circle: {t('launch.bar.checked')}]"]
    found = []
    for severity in Severity:
        if count := sum(finding.severity is severity for finding in findings):
            words = t(f"launch.bar.{severity}_{'one' if count == 1 else 'many'}", count=count)
            found.append(f":{_COLOURS[severity]}-badge[{words}]")
    return found
