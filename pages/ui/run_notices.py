"""Notices of the browser itself, for whoever has the monitor open in a tab that is not in front: a run has ended, or something is wrong.

The browser asks for permission only when the button is clicked; the choice stays in the browser. Nothing leaves the machine: unlike
push messages, these need the open tab. Browsers slow the clock of hidden tabs, so a notice can come a minute late.
"""

from typing import Any, Final

import streamlit as st

from core.runs.directory import RunDirectory
from core.runs.state import Phase, RunStatus
from core.runs.watch import read_alerts
from pages.ui.run_alerts import alert_words
from pages.ui.text import t

_ENDS: Final = (Phase.FINISHED, Phase.STOPPED, Phase.FAILED, Phase.LOST)
"""A run that a person cancelled is no news to that person."""
_HTML: Final = "<button type='button' hidden></button><span hidden></span>"
_CSS: Final = """
button, span { font: inherit; font-size: 0.875rem; color: var(--st-text-color); }
button { background: none; border: 1px solid var(--st-border-color); border-radius: var(--st-button-radius, 0.5rem);
  padding: 0.15rem 0.75rem; cursor: pointer; }
button:hover, button:focus-visible { border-color: var(--st-primary-color); color: var(--st-primary-color); }
button::before, span::before { font-family: "Material Symbols Rounded"; font-size: 1.1rem; vertical-align: middle;
  margin-right: 0.35rem; content: "notifications"; font-feature-settings: "liga"; }
span::before { content: "notifications_off"; }
button[aria-pressed=true]::before { content: "notifications_active"; }
span { opacity: 0.65; }
"""
_JS: Final = """
const CHOICE = "danlu_notices";
// On the window: a script run may mount the component anew, and what was told then must not be told again.
const seen = (window.danluSeenNotices ??= new Map());

export default function ({ data, parentElement }) {
  const button = parentElement.querySelector("button");
  const line = parentElement.querySelector("span");
  const canNotify = window.isSecureContext && "Notification" in window;
  const isOn = () => canNotify && Notification.permission === "granted" && localStorage.getItem(CHOICE) !== "off";

  const draw = () => {
    const isDenied = canNotify && Notification.permission === "denied";
    const words = !canNotify ? data.insecure : isDenied ? data.denied : "";
    line.textContent = words;
    line.hidden = !data.is_active || !words;
    button.textContent = isOn() ? data.turn_off : data.turn_on;
    button.hidden = !data.is_active || Boolean(words);
    button.setAttribute("aria-pressed", String(isOn()));
  };
  button.onclick = async () => {
    // What the button said counts: the permission may have changed since it was drawn.
    if (button.getAttribute("aria-pressed") === "true") localStorage.setItem(CHOICE, "off");
    else {
      localStorage.removeItem(CHOICE);
      if (Notification.permission === "default") await Notification.requestPermission();
    }
    draw();
  };
  draw();

  const known = seen.get(data.run);
  seen.set(data.run, new Set([...(known ?? []), ...data.notices.map((notice) => notice.id)]));
  // What was there when the run was opened is no news.
  if (!known || !isOn() || !document.hidden) return;
  for (const notice of data.notices.filter((notice) => !known.has(notice.id))) {
    const shown = new Notification(notice.title, { body: notice.body, tag: notice.id });
    shown.onclick = () => { window.focus(); shown.close(); };
  }
}
"""
_notices = st.components.v2.component("danlu_notices", html=_HTML, css=_CSS, js=_JS)


def run_notices(run: RunDirectory, status: RunStatus) -> None:
    """A button while the run goes on, and what there is to tell; nothing for a run that was not started by the app."""
    if not run.spec_file.exists():
        return
    words = {name: t(f"notices.{name}") for name in ("turn_on", "turn_off", "denied", "insecure")}
    facts = {"run": run.id, "is_active": status.phase.is_active, "notices": notices(run, status)}
    _notices(data={**words, **facts}, key="monitor_notices")


def notices(run: RunDirectory, status: RunStatus) -> list[dict[str, Any]]:
    """Title and body in plain text; the same event has the same `id` at every look."""
    found = []
    for alert in read_alerts(run)[0]:
        if alert.level != "info":
            what, next_step = alert_words(alert)
            subject = f"{run.id} {alert.kind} {alert.subject} {alert.since}"
            found.append({"id": subject, "title": f"{run.id}: {_plain(what)}", "body": _plain(next_step)})
    if status.phase in _ENDS:
        title = f"{run.id}: {t(f'runs.phases.{status.phase}')}"
        body = t("notices.ended" if status.phase in (Phase.FINISHED, Phase.STOPPED) else "notices.broken")
        found.append({"id": f"{run.id} {status.phase} {status.ended_at}", "title": title, "body": body})
    return found


def _plain(markdown: str) -> str:
    return markdown.replace("**", "").replace("`", "")
