"""How answers are chosen: the settings beside the chat."""

from typing import Any

import streamlit as st

from core.chat.client import Target
from pages.ui.text import t

_DEFAULTS: dict[str, Any] = {
    "chat_max_tokens": 1024,
    "chat_top_p": 0.8,
    "chat_temperature": 0.7,
    "chat_top_k": 0,
    "chat_min_p": 0.0,
    "chat_repetition_penalty": 1.0,
    "chat_use_seed": False,
    "chat_seed": 0,
    "chat_system": "",
    "chat_stop": "",
    "chat_device": "auto",
    "chat_dtype": "auto",
}


_NEUTRAL: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Not sent: other programs' servers refuse fields that they do not know."""


def settings_panel(target: Target | None) -> tuple[dict[str, Any], str]:
    """The request's settings and the system prompt."""
    for key, value in _DEFAULTS.items():
        st.session_state.setdefault(key, value)
    longest = target.max_tokens if target and target.max_tokens else 32768
    st.session_state["chat_max_tokens"] = min(int(st.session_state["chat_max_tokens"]), longest)
    st.slider(
        t("chat.settings.max_tokens"), 8, longest, step=8, key="chat_max_tokens", help=t("chat.settings.max_tokens_help"),
        persist_state="session",
    )  # fmt: skip
    st.slider(
        t("chat.settings.top_p"), 0.0, 1.0, step=0.01, key="chat_top_p", help=t("chat.settings.top_p_help"),
        persist_state="session",
    )  # fmt: skip
    st.slider(
        t("chat.settings.temperature"), 0.0, 2.0, step=0.01, key="chat_temperature",
        help=t("chat.settings.temperature_help"), persist_state="session",
    )  # fmt: skip
    if target is not None and target.has_adapter:
        st.toggle(t("chat.compare"), key="chat_compare", help=t("chat.compare_help"), persist_state="session")
    with st.expander(t("chat.settings.more"), icon=":material/tune:"):
        _more()
    return _request(), str(st.session_state["chat_system"]).strip()


def _more() -> None:
    st.text_area(
        t("chat.settings.system"),
        key="chat_system",
        persist_state="session",
        height=80,
        help=t("chat.settings.system_help"),
    )
    st.number_input(
        t("chat.settings.top_k"), 0, 1000, key="chat_top_k", persist_state="session", help=t("chat.settings.top_k_help")
    )
    st.number_input(
        t("chat.settings.min_p"),
        0.0,
        1.0,
        step=0.01,
        key="chat_min_p",
        persist_state="session",
        help=t("chat.settings.min_p_help"),
    )
    st.number_input(
        t("chat.settings.repetition_penalty"),
        0.5,
        2.0,
        step=0.05,
        key="chat_repetition_penalty",
        persist_state="session",
        help=t("chat.settings.repetition_penalty_help"),
    )
    st.checkbox(t("chat.settings.use_seed"), key="chat_use_seed", persist_state="session")
    st.number_input(
        t("chat.settings.seed"), 0, 2**31 - 1, key="chat_seed", persist_state="session",
        disabled=not st.session_state["chat_use_seed"], help=t("chat.settings.seed_help")
    )  # fmt: skip
    st.text_area(
        t("chat.settings.stop"), key="chat_stop", persist_state="session", height=80, help=t("chat.settings.stop_help")
    )
    names = {"auto": t("chat.settings.auto")}
    weights = {"auto": t("chat.settings.as_saved"), "int8": t("chat.settings.int8")}
    st.selectbox(
        t("chat.settings.device"), ["auto", "cpu", "cuda"], format_func=lambda value: names.get(value, value),
        key="chat_device", persist_state="session", help=t("chat.settings.device_help")
    )  # fmt: skip
    st.selectbox(
        t("chat.settings.dtype"), ["auto", "float32", "bfloat16", "float16", "int8"],
        format_func=lambda value: weights.get(value, value), key="chat_dtype", persist_state="session", help=t("chat.settings.dtype_help")
    )  # fmt: skip


def _request() -> dict[str, Any]:
    state = st.session_state
    names = ("max_tokens", "top_p", "temperature", "top_k", "min_p", "repetition_penalty")
    settings = {name: state[f"chat_{name}"] for name in names if state[f"chat_{name}"] != _NEUTRAL.get(name)}
    if state["chat_use_seed"]:
        settings["seed"] = int(state["chat_seed"])
    if words := [word for word in str(state["chat_stop"]).splitlines() if word]:
        settings["stop"] = words
    return settings
