"""The turns of a conversation and what can be done with them; the list of saved ones."""

from typing import Any

import streamlit as st

from core.chat.conversation import (
    Conversation,
    Turn,
    delete_conversation,
    list_conversations,
    load_conversation,
    new_conversation,
    save_conversation,
    split_thinking,
)
from core.chat.markdown import safe_markdown
from core.errors import DanluError
from core.project import Project
from pages.ui.chat_export import export_conversation
from pages.ui.text import t

AVATARS = {"user": ":material/person:", "assistant": ":material/local_fire_department:"}
_SHOWN_CONVERSATIONS = 50


def current_conversation(project: Project) -> Conversation:
    """The one chosen in this tab, as it is on the disk; a new one if none is. Raises InputError if its file is broken."""
    chosen = st.session_state.get("chat_conversation")
    if chosen and (project.chat / f"{chosen}.json").is_file():
        return load_conversation(project, str(chosen))
    conversation = new_conversation()
    if chosen:
        conversation.id = str(chosen)
    st.session_state["chat_conversation"] = conversation.id
    return conversation


def history_panel(project: Project) -> None:
    """New chat, clear history, saved conversations."""
    saved = list_conversations(project)[:_SHOWN_CONVERSATIONS]
    st.button(
        t("chat.history.new"), key="chat_new", icon=":material/add:", width="stretch", on_click=_choose, args=(None,)
    )
    st.button(
        t("chat.history.clear"), key="chat_clear", icon=":material/delete_sweep:", width="stretch",
        help=t("chat.history.clear_help"), on_click=_clear, args=(project,),
    )  # fmt: skip
    if saved:
        with st.expander(t("chat.history.open"), icon=":material/history:"):
            for identity, title in saved:
                st.button(
                    safe_markdown(title).replace("[", "(").replace("]", ")"), key=f"chat_open_{identity}", type="tertiary",
                    on_click=_reopen, args=(project, identity),
                )  # fmt: skip


def show_turns(project: Project, conversation: Conversation, *, is_ready: bool, hides_last: bool = False) -> None:
    """All turns; the last answer has the actions below it. `hides_last`: it is about to be answered again."""
    if conversation.branch_of:
        st.caption(t("chat.history.branch_of"))
    last = len(conversation.turns) - 1
    for index, turn in enumerate(conversation.turns):
        if hides_last and index == last and turn.role == "assistant":
            continue
        with st.chat_message(turn.role, avatar=AVATARS[turn.role]):
            _show(turn)
        if index == last and turn.role == "assistant":
            _actions(project, conversation, is_ready=is_ready)


def show_answer(text: str, *, is_streaming: bool = False) -> None:
    """Markdown with the thoughts folded away and, while it streams, a cursor."""
    thoughts, spoken, is_thinking = split_thinking(text)
    if thoughts or is_thinking:
        with st.expander(t("chat.thinking_now" if is_thinking else "chat.thinking"), icon=":material/psychology:"):
            st.markdown(safe_markdown(thoughts))
    st.markdown(safe_markdown(spoken) + ("▌" if is_streaming else ""))


def facts(usage: dict[str, Any], reason: str | None) -> str:
    """One line: tokens, time to the first, tokens a second, how it ended."""
    parts = []
    timings, count = usage.get("timings") or {}, usage.get("completion_tokens")
    rate, first = timings.get("tokens_per_second"), timings.get("first_token_seconds")
    if count and rate and first is not None:
        parts.append(t("chat.tokens_rate", count=count, first=f"{first:.2f}", rate=f"{rate:.1f}"))
    elif count:
        parts.append(t("chat.tokens", count=count))
    if cached := (usage.get("prompt_tokens_details") or {}).get("cached_tokens"):
        parts.append(t("chat.cached", count=cached))
    parts += {"cancelled": [t("chat.stopped")], "length": [t("chat.cut")]}.get(str(reason), [])
    return " · ".join(parts)


def _show(turn: Turn) -> None:
    if turn.role == "user":
        st.markdown(safe_markdown(turn.content))
        return
    if turn.beside:
        columns = st.columns(2, border=True)
        beside = turn.beside
        answers = ((t("chat.base"), beside["content"], beside.get("usage") or {}, beside.get("finish_reason")),
                   (t("chat.tuned"), turn.content, turn.usage, turn.finish_reason))  # fmt: skip
        for column, (name, text, usage, reason) in zip(columns, answers, strict=True):
            with column:
                st.caption(name)
                show_answer(text)
                st.caption(facts(usage, reason))
        return
    show_answer(turn.content)
    st.caption(facts(turn.usage, turn.finish_reason))
    if turn.previous:
        with st.expander(t("chat.actions.older", count=len(turn.previous))):
            for old in turn.previous:
                st.markdown(safe_markdown(str(old.get("content", ""))))
                st.divider()


def _actions(project: Project, conversation: Conversation, *, is_ready: bool) -> None:
    with st.container(horizontal=True, gap="small"):
        if st.button(
            t("chat.actions.regenerate"),
            key="chat_regenerate",
            icon=":material/refresh:",
            type="tertiary",
            disabled=not is_ready,
        ):
            st.session_state["chat_again"] = True
            st.rerun()
        if st.button(
            t("chat.actions.edit"),
            key="chat_edit_button",
            icon=":material/edit:",
            type="tertiary",
            disabled=not is_ready,
        ):
            _edit_dialog(conversation)
        if st.button(t("chat.actions.branch"), key="chat_branch", icon=":material/call_split:", type="tertiary"):
            branch = conversation.branch(len(conversation.turns))
            save_conversation(project, branch)
            st.session_state["chat_conversation"] = branch.id
            st.rerun()
        export_conversation(project, conversation)


def _edit_dialog(conversation: Conversation) -> None:
    index = max(at for at, turn in enumerate(conversation.turns) if turn.role == "user")

    @st.dialog(t("chat.actions.edit_title"))
    def dialog() -> None:
        text = st.text_area(
            t("chat.actions.edit_title"), conversation.turns[index].content, label_visibility="collapsed"
        )
        if st.button(t("chat.actions.edit_send"), type="primary", disabled=not text.strip()):
            st.session_state["chat_edit"] = (index, text)
            st.rerun()

    dialog()


def _choose(identity: str | None) -> None:
    st.session_state["chat_conversation"] = identity


def _reopen(project: Project, identity: str) -> None:
    """A saved conversation goes on with the system prompt that it had."""
    _choose(identity)
    try:
        st.session_state["chat_system"] = load_conversation(project, identity).system
    except DanluError:
        return  # the page says what is wrong with the file


def _clear(project: Project) -> None:
    if chosen := st.session_state.get("chat_conversation"):
        delete_conversation(project, str(chosen))
    _choose(None)
