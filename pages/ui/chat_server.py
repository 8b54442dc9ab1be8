"""A server of another program as what one talks to: LMDeploy, vLLM, Ollama, or any with OpenAI's API."""

import streamlit as st

from core.chat.client import Endpoint, Target, list_models
from core.chat.models import ChatModel, find_served_models
from core.chat.servers import KIND, find_servers, installed_engines, start_server
from core.errors import DanluError
from core.project import Project
from pages.ui.audit import note
from pages.ui.jobs import job_panel
from pages.ui.text import show_error, t

_LOOK_SECONDS = 2.0
_EXAMPLES = "LMDeploy `http://127.0.0.1:23333` · vLLM `http://127.0.0.1:8000` · Ollama `http://127.0.0.1:11434`"


def server_bar(project: Project, models: list[ChatModel]) -> Target | None:
    """Address, key and model of the server; None until it has answered."""
    _start_bar(project, [*(model for model in models if model.adapter is None), *find_served_models(project)])
    started = find_servers(project)
    if started and not st.session_state.get("chat_server_url"):
        _fill(started[0].endpoint)
    address, secret, button = st.columns([3, 2, 1], vertical_alignment="bottom")
    url = address.text_input(
        t("chat.server.url"),
        key="chat_server_url",
        placeholder="http://127.0.0.1:8000",
        persist_state="session",
        help=t("chat.server.url_help"),
    ).strip()
    key = secret.text_input(
        t("chat.server.key"),
        key="chat_server_key",
        type="password",
        persist_state="session",
        help=t("chat.server.key_help"),
    )
    if button.button(t("chat.server.connect"), key="chat_server_connect", type="primary", width="stretch"):
        _connect(url, key)
    found_at, names = st.session_state.get("chat_server_models", ("", []))
    if found_at != url or not names:
        if any(server.endpoint.url == url for server in started):
            st.fragment(_wait, run_every=_LOOK_SECONDS)(Endpoint(url, key))
            return None
        st.caption(f"{t('chat.server.caption')} {_EXAMPLES}")
        return None
    name = st.selectbox(
        t("chat.server.model"),
        names,
        key="chat_server_model",
        persist_state="session",
        help=t("chat.server.model_help"),
    )
    return Target(Endpoint(url, key, str(name)))


def _start_bar(project: Project, models: list[ChatModel]) -> None:
    """Start vLLM or LMDeploy for a whole model, where one is installed."""
    engines = installed_engines()
    if engines and models:
        by_id = {model.id: model for model in models}
        engine, picker, button = st.columns([1, 3, 1], vertical_alignment="bottom")
        chosen_engine = engine.selectbox(
            t("chat.server.engine"), engines, key="chat_server_engine", help=t("chat.server.engine_help")
        )
        chosen = picker.selectbox(
            t("chat.pick"),
            list(by_id),
            format_func=lambda identity: by_id[identity].name,
            key="chat_server_folder",
            help=t("chat.pick_help"),
        )
        button.button(
            t("chat.server.start"), key="chat_server_start", width="stretch", on_click=_start,
            args=(project, str(chosen_engine), by_id[chosen]),
        )  # fmt: skip
    job_panel(project, (KIND,))


def _start(project: Project, engine: str, model: ChatModel) -> None:
    try:
        run, endpoint = start_server(project, engine, model.path, model.name)
        note("start", run.id)
    except DanluError as error:
        show_error(error)
        return
    _fill(endpoint)


def _fill(endpoint: Endpoint) -> None:
    st.session_state["chat_server_url"] = endpoint.url
    st.session_state["chat_server_key"] = endpoint.key


def _wait(endpoint: Endpoint) -> None:
    """Connect to a server that was started here as soon as it has loaded its model."""
    st.info(t("chat.server.loading"), icon=":material/hourglass_top:")
    try:
        names = list_models(endpoint, timeout_seconds=1.0)
    except DanluError:
        return  # it loads; its panel shows how it ends
    st.session_state["chat_server_models"] = (endpoint.url, names)
    st.rerun()


def _connect(url: str, key: str) -> None:
    st.session_state.pop("chat_server_models", None)
    try:
        names = list_models(Endpoint(url, key))
    except DanluError as error:
        show_error(error)
        return
    if names:
        st.session_state["chat_server_models"] = (url, names)
    else:
        st.warning(t("chat.server.no_models"), icon=":material/dns:")
