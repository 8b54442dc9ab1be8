"""Chat: pick a model, load it into its own process, talk to it; or ask several models the same questions."""

import streamlit as st

from core.chat.conversation import save_conversation
from core.chat.models import find_chat_models
from core.errors import DanluError
from pages.ui import shell
from pages.ui.chat_compare import compare_view
from pages.ui.chat_export import show_notice
from pages.ui.chat_from_run import wants_comparison
from pages.ui.chat_history import current_conversation, history_panel, show_turns
from pages.ui.chat_model import model_bar
from pages.ui.chat_settings import settings_panel
from pages.ui.chat_stream import answer
from pages.ui.chat_template import template_view
from pages.ui.text import show_error, t

VIEWS = ("talk", "compare")

project = shell.require_project()
shell.page_header("chat")
models = find_chat_models(project, shell.settings())
show_notice()
if models:
    # No default beside the key: Streamlit warns of a value that is set twice.
    st.session_state["chat_view"] = "compare" if wants_comparison() else st.session_state.get("chat_view", "talk")
    view = st.segmented_control(
        t("chat.views.title"), VIEWS, required=True, key="chat_view", label_visibility="collapsed",
        format_func=lambda name: t(f"chat.views.{name}"), persist_state="session",
    )  # fmt: skip
    if view == "compare":
        compare_view(project, models)
        st.stop()
else:
    shell.missing(t("chat.empty"), "model")

target, worker = model_bar(project, models)
talk, panel = st.columns([3, 1], gap="large")
with panel:
    settings, system = settings_panel(target)
    history_panel(project)
# Only with a model to ask: the box scrolls its page to the end, past the bar where one is loaded.
asked = st.chat_input(t("chat.placeholder"), key="chat_input", submit_mode="stop") if target else None
with talk:
    try:
        conversation = current_conversation(project)
        conversation.system = system
        edited = st.session_state.pop("chat_edit", None)
        if edited:
            conversation = conversation.edit(*edited)
            st.session_state["chat_conversation"] = conversation.id
        is_again = st.session_state.pop("chat_again", False)
        if asked:
            conversation.ask(str(asked))
        is_asking = target is not None and bool(asked or edited or is_again)
        if not conversation.turns and not is_asking:
            hint = "chat.placeholder" if target else "chat.not_loaded" if models else "chat.not_connected"
            st.info(t(hint), icon=":material/forum:")
        show_turns(project, conversation, is_ready=target is not None, hides_last=is_asking and is_again)
        if is_asking and target is not None:
            save_conversation(project, conversation)
            answer(project, conversation, target, settings)
            st.rerun()
        if target is not None and worker is not None and worker.served is not None:
            template_view(target, conversation, worker.served["template"])
    except DanluError as error:
        show_error(error)
