"""One answer as it comes: streams into the page, is kept whatever stops it, and hangs up when the page goes away."""

from typing import Any

import streamlit as st

from core.chat.client import Endpoint, Reply, Target, stream_together
from core.chat.conversation import Conversation, save_conversation
from core.errors import DanluError
from core.project import Project
from pages.ui.chat_history import AVATARS, show_answer
from pages.ui.text import t

_BASE_SUFFIX = "@base"
_STREAMING = "chat_streaming"
"""In the session's state while an answer comes."""
_LOOK_SECONDS = 0.5


def answer(project: Project, conversation: Conversation, target: Target, settings: dict[str, Any]) -> None:
    """Ask the model and stream its answer (and the base model's beside it, if that is wanted).

    A stop raises at any st.* call, so what has come is put into the turn and saved in `finally`, which calls no st.*.
    Raises DanluError if the model cannot answer.
    """
    st.session_state.pop(_STREAMING, None)
    st.fragment(_after_stop, run_every=_LOOK_SECONDS)()
    st.session_state[_STREAMING] = True
    endpoint = target.endpoint
    compares = bool(target.has_adapter and st.session_state.get("chat_compare"))
    end = len(conversation.turns) - (conversation.turns[-1].role == "assistant")
    messages = conversation.messages(end)
    turn = conversation.begin_answer(target.name)
    endpoints = [endpoint]
    if compares:
        endpoints.append(Endpoint(endpoint.url, endpoint.key, target.name + _BASE_SUFFIX))
    replies = [Reply() for _ in endpoints]
    try:
        with st.chat_message("assistant", avatar=AVATARS["assistant"]):
            places = _places(compares=compares)
            for _ in stream_together(endpoints, messages, settings, replies):
                for place, reply in zip(places, replies, strict=True):
                    with place.container():
                        show_answer(reply.text, is_streaming=reply.reason is None)
    except DanluError:
        st.session_state.pop(_STREAMING, None)  # the page shows the error: nothing may draw over it
        raise
    finally:
        for reply in replies:
            reply.cancel()
            reply.reason = reply.reason or "cancelled"
        tuned = replies[0]
        turn.content, turn.finish_reason, turn.usage = tuned.text, tuned.reason, tuned.usage
        if compares:
            base = replies[1]
            turn.beside = {"content": base.text, "finish_reason": base.reason, "usage": base.usage}
        if not any(reply.text for reply in replies) and tuned.reason in ("error", "cancelled"):
            _forget(conversation)
        save_conversation(project, conversation)
    st.session_state.pop(_STREAMING, None)


def _after_stop() -> None:
    """The stop button ends the script and draws nothing new: once it has, show what was kept and what can be done with it.

    A fragment waits for a script that runs, so while this one streams this is never reached.
    """
    if st.session_state.pop(_STREAMING, False):
        st.rerun()


def _places(*, compares: bool) -> list[Any]:
    """Where the answers go: the tuned model's first in the list, but on the right."""
    if not compares:
        return [st.empty()]
    left, right = st.columns(2, border=True)
    left.caption(t("chat.base"))
    right.caption(t("chat.tuned"))
    return [right.empty(), left.empty()]


def _forget(conversation: Conversation) -> None:
    """Nothing came: the question stays, the empty answer does not, and an earlier answer comes back."""
    empty = conversation.turns.pop()
    if empty.previous:
        earlier = conversation.begin_answer("")
        last = empty.previous.pop()
        for name, value in last.items():
            setattr(earlier, name, value)
        earlier.previous = empty.previous
