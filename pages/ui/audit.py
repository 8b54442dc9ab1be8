"""Who did what: written down where it happens, and shown as a table with a filter."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core import settings
from core.access import audit
from core.access.gate import COOKIE
from core.access.sessions import session_name
from pages.ui.text import t


def note(action: str, target: str) -> None:
    """Write into the audit log that the person of this session did `action` (one of `core.access.audit.ACTIONS`) to `target`."""
    audit.record(
        settings.load().home,
        action,
        who=visitor(st.user.to_dict(), st.context.cookies),
        project=Path(st.session_state.get("project_root", "")).name,
        target=target,
        address=st.context.ip_address or "",
    )


def visitor(user: Mapping[str, Any], cookies: Mapping[str, str]) -> str:
    """Who sits at this session: the address of a single sign-on, which login of the password gate, or on loopback the account."""
    email = user.get("email")
    if email:
        return str(email)
    session = cookies.get(COOKIE)
    return session_name(session) if session else audit.system_user()


def show_log() -> None:
    """The log, the latest first, filtered by what was done and by any word in the line."""
    home = settings.load().home
    entries = audit.read(home)
    st.caption(t("audit.intro", path=str(home / audit.FILE)))
    if not entries:
        st.caption(t("audit.nothing"))
        return
    left, right = st.columns([2, 3])
    found = [action for action in audit.ACTIONS if any(entry.action == action for entry in entries)]
    actions = left.multiselect(
        t("audit.action"),
        found,
        format_func=_name,
        key="audit_actions",
        placeholder=t("audit.all_actions"),
        help=t("audit.action_help"),
    )
    query = (
        right.text_input(t("audit.find"), key="audit_find", placeholder=t("audit.find_hint"), help=t("audit.find_help"))
        .strip()
        .casefold()
    )
    shown = [
        entry
        for entry in entries
        if (not actions or entry.action in actions)
        and query in " ".join((entry.who, entry.project, entry.target, entry.address)).casefold()
    ]
    columns = ("at", "action", "who", "project", "target", "address")
    rows = [[_at(entry), _name(entry.action), *(getattr(entry, name) for name in columns[2:])] for entry in shown]
    table = pd.DataFrame(rows, columns=[t(f"audit.columns.{name}") for name in columns])
    st.dataframe(
        table, hide_index=True, width="stretch", height=min(360, 40 + 35 * max(1, len(rows))), key="audit_table"
    )


def _name(action: str) -> str:
    return t(f"audit.actions.{action}") if action in audit.ACTIONS else action


def _at(entry: audit.Entry) -> str:
    return f"{datetime.fromtimestamp(entry.at):%Y-%m-%d %H:%M:%S}"
