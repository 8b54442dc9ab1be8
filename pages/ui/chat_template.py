"""How the model is really asked: the prompt as the template renders it, and whether the tokenizer's own template agrees."""

import streamlit as st

from core.chat.client import Target, read_prompt
from core.chat.conversation import Conversation
from core.errors import DanluError
from pages.ui.text import show_error, t


def template_view(target: Target, conversation: Conversation, template: str) -> None:
    """Folded; asks the worker only while it is open."""
    box = st.expander(
        t("chat.template.title"), icon=":material/data_object:", key="chat_template_box", on_change="rerun"
    )
    if not box.open:
        return
    with box:
        messages = conversation.messages()
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] != "user":
            messages = [*messages, {"role": "user", "content": t("chat.template.example")}]
        try:
            prompt = read_prompt(target.endpoint, messages)
        except DanluError as error:
            show_error(error)
            return
        st.caption(t("chat.template.caption", template=template, tokens=prompt["tokens"]))
        st.code(prompt["text"], language=None, wrap_lines=True, height=180)
        if prompt["is_same"]:
            st.caption(t("chat.template.same"))
        elif prompt["own_text"] is not None:
            st.warning(t("chat.template.differs", template=template), icon=":material/compare_arrows:")
            st.code(prompt["own_text"], language=None, wrap_lines=True, height=180)
