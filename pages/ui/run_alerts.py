"""Alerts of a run: what is wrong now above the curves, everything that was in a list, and what the run does about it."""

import time
from datetime import UTC, datetime
from pathlib import Path

import streamlit as st

from core.errors import DanluError
from core.files import write_json
from core.messages import message
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.health import Alert
from core.runs.state import RunStatus
from core.runs.watch import STOP_KINDS, WatchRules, project_rules_file, read_alerts, read_rules
from core.runs.webhook import check, post
from pages.ui.text import duration, language, say, show_error, t

_MOST_SHOWN = 3
_NEW_SECONDS = 15.0
"""An alert that is older is no news for who has just opened the page."""
_BOXES = {"info": st.info, "warning": st.warning, "error": st.error}
_ICONS = {"info": ":material/info:", "warning": ":material/warning:", "error": ":material/emergency_home:"}


def open_alerts(run: RunDirectory, status: RunStatus) -> None:
    """What is wrong now, the worst first; a toast for each that is new since the last look."""
    alerts = [alert for alert in read_alerts(run)[0] if alert.until is None and status.phase.is_active]
    alerts.sort(key=lambda alert: list(_BOXES).index(alert.level), reverse=True)
    for alert in alerts[:_MOST_SHOWN]:
        _BOXES[alert.level](f"**{_what(alert)}** {_next(alert)} :small[({_since(alert)})]", icon=_ICONS[alert.level])
    _toast(run, alerts)


def count_alerts(run: RunDirectory) -> int:
    """How many there were, mere information not counted."""
    return sum(alert.level != "info" for alert in read_alerts(run)[0])


def run_alerts(project: Project, run: RunDirectory, *, is_active: bool) -> None:
    """Every alert with its evidence and time, and the settings."""
    alerts, delivery = read_alerts(run)
    if run.spec_file.exists():
        _settings(project, run, is_active=is_active)
    if delivery.get("sent") or delivery.get("failed"):
        st.caption(t("health.delivery", sent=delivery["sent"], failed=delivery["failed"]))
        if delivery.get("reason"):
            st.caption(t("health.delivery_failed", reason=delivery["reason"]))
    if not alerts:
        st.caption(t("health.none"))
    for alert in reversed(alerts):
        with st.container(border=True):
            st.markdown(f"{_ICONS[alert.level]} **{_what(alert)}**")
            st.markdown(_next(alert))
            st.caption(_since(alert))


def _settings(project: Project, run: RunDirectory, *, is_active: bool) -> None:
    rules = read_rules(run.watch_file)
    with st.expander(t("health.settings"), icon=":material/notifications:", expanded=is_active):
        stop_on = st.multiselect(
            t("health.stop_on"),
            STOP_KINDS,
            default=rules.stop_on,
            format_func=lambda kind: t(f"health.kinds.{kind}"),
            key=f"monitor_stop_on_{run.id}",
            help=t("health.stop_on_help"),
        )
        url = st.text_input(
            t("health.webhook"),
            rules.webhook,
            key=f"monitor_webhook_{run.id}",
            placeholder=t("health.webhook_hint"),
            help=t("health.webhook_help"),
        ).strip()
        is_for_all = st.checkbox(t("health.for_new_runs"), key="monitor_for_new_runs")
        with st.container(horizontal=True):
            chosen = WatchRules(tuple(stop_on), url, language())
            if st.button(t("health.apply"), key="monitor_apply_rules", type="primary"):
                _apply(chosen, [run.watch_file, *([project_rules_file(project.private)] if is_for_all else [])])
            if st.button(t("health.test"), key="monitor_test_webhook", disabled=not url):
                _test(run, url)


def _apply(rules: WatchRules, files: list[Path]) -> None:
    try:
        if rules.webhook:
            check(rules.webhook)
        for file in files:
            write_json(file, rules.to_json())
    except DanluError as error:
        show_error(error)
        return
    st.toast(t("health.applied"), icon=":material/check:")


def _test(run: RunDirectory, url: str) -> None:
    try:
        post(url, {"event": "test", "run": run.id, "text": t("health.test_text")})
    except DanluError as error:
        show_error(error)
        return
    st.toast(t("health.test_sent"), icon=":material/check:")


def _toast(run: RunDirectory, alerts: list[Alert]) -> None:
    seen: set[str] = st.session_state.setdefault("monitor_seen_alerts", set())
    for alert in alerts:
        name = f"{run.id} {alert.kind} {alert.subject} {alert.since}"
        is_new = time.time() - alert.since < _NEW_SECONDS
        if is_new and name not in seen and alert.level != "info":
            seen.add(name)
            st.toast(_what(alert), icon=_ICONS[alert.level], duration="long")


def alert_words(alert: Alert) -> tuple[str, str]:
    """What is wrong, and what to do."""
    return _what(alert), _next(alert)


def _what(alert: Alert) -> str:
    return say(message(f"health.alerts.{alert.kind}.what", **alert.params))


def _next(alert: Alert) -> str:
    return say(message(f"health.alerts.{alert.kind}.next", **alert.params))


def _since(alert: Alert) -> str:
    clock = f"{datetime.fromtimestamp(alert.since, UTC).astimezone():%m-%d %H:%M:%S}"
    params = {"time": clock, "iteration": f"{alert.iteration or 0:,}"}
    if alert.until is None:
        return t("health.since", **params) if alert.iteration else t("health.since_start", time=clock)
    lasted = duration(max(0.0, alert.until - alert.since))
    if alert.iteration:
        return t("health.span", duration=lasted, **params)
    return t("health.span_start", duration=lasted, time=clock)
