"""Words on pages, in the language of this browser session."""

from typing import Any

import streamlit as st

from core.errors import DanluError
from core.i18n import LANGUAGES, Catalog, catalog, guess_language
from core.messages import Message


def language() -> str:
    """The language of this session: chosen, else guessed from the browser."""
    chosen = st.session_state.get("language")
    return str(chosen) if chosen in LANGUAGES else guess_language(st.context.locale)


def words() -> Catalog:
    return catalog(language())


def t(key: str, /, **params: Any) -> str:
    """The sentence for `key` in this session's language."""
    return words().text(key, **params)


def say(message: Message) -> str:
    return words().say(message)


def show_error(error: DanluError) -> None:
    """A red box: what happened and where, and below it what to do."""
    what, next_step = words().explain(error)
    st.error(f"{what}\n\n{next_step}", icon=":material/error:")


def gib(size_bytes: float) -> str:
    """Bytes for people: 1.2 GiB, 340 MiB, 12 KiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return (
                f"{size_bytes / factor:.1f} {unit}" if size_bytes < 10 * factor else f"{size_bytes / factor:.0f} {unit}"
            )
    return f"{size_bytes:.0f} B"


def span(low: str, high: str) -> str:
    """From one to the other, both as people read them; once where they read the same."""
    return low if low == high else f"{low} – {high}"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 5 s, 2 h 14 min; 42 秒, 3 分 5 秒, 2 小时 14 分."""
    whole = round(seconds)
    if whole < 60:
        return t("shell.durations.seconds", seconds=whole)
    if whole < 3600:
        return t("shell.durations.minutes", minutes=whole // 60, seconds=whole % 60)
    return t("shell.durations.hours", hours=whole // 3600, minutes=whole % 3600 // 60)
