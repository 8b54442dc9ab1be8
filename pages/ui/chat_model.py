"""The top of the chat page: which model, load and unload, how far it is, what it really got, and its API."""

from pathlib import Path

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from core.chat.client import Target, Worker, find_workers, read_worker, start_worker, stop_worker
from core.chat.models import ChatModel
from core.errors import DanluError
from core.files import read_json
from core.messages import Message
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.jobs import active_runs
from core.runs.state import Phase
from pages.ui.audit import note
from pages.ui.chat_server import server_bar
from pages.ui.run_waiting import waiting_text
from pages.ui.text import gib, say, show_error, t

_SIGKILL = 9
_OTHER = "server"
"""In the picker: a server of another program."""


def model_bar(project: Project, models: list[ChatModel]) -> tuple[Target | None, Worker | None]:
    """Picker and buttons; what can be talked to, and the worker behind it if it is ours."""
    by_id = {model.id: model for model in models}
    names = {model.id: f"{t(f'chat.kinds.{model.kind}')} · {model.name}" for model in models}
    names[_OTHER] = t("chat.server.other")
    _follow_link(by_id)
    if st.session_state.get("chat_model") not in names:
        st.session_state["chat_model"] = next(iter(names))
    picker, button = st.columns([5, 1], vertical_alignment="bottom")
    identity = picker.selectbox(
        t("chat.pick"),
        list(names),
        format_func=names.__getitem__,
        key="chat_model",
        persist_state="session",
        help=t("chat.pick_help"),
    )
    if identity == _OTHER:
        return server_bar(project, models), None
    worker = _worker_bar(project, by_id[identity], button)
    return (worker.target() if worker else None), worker


def _follow_link(by_id: dict[str, ChatModel]) -> None:
    """`?model=<folder>` of another page chooses that model, once."""
    asked = st.query_params.get("model")
    if not asked or asked == st.session_state.get("chat_asked"):
        return
    st.session_state["chat_asked"] = asked
    found = [model.id for model in by_id.values() if asked in (str(model.adapter), str(model.path), model.id)]
    exact = [identity for identity in found if identity.endswith(f":{asked}")]
    if found:
        st.session_state["chat_model"] = (exact or found)[0]


def _worker_bar(project: Project, chosen: ChatModel, button: DeltaGenerator) -> Worker | None:
    """Load and unload; the worker of the chosen model while it loads or serves."""
    worker = next((each for each in reversed(find_workers(project)) if _serves(each, chosen)), None)
    if worker is None:
        if button.button(
            t("chat.load"), key="chat_load", type="primary", width="stretch", disabled=not chosen.is_there
        ):
            _load(project, chosen)
        _why_not(project, chosen)
        return None
    button.button(t("chat.unload"), key="chat_unload", width="stretch", on_click=stop_worker, args=(worker.run,))
    if worker.served is None:
        st.fragment(_loading, run_every=0.7)(worker.run)
    else:
        st.caption(t("chat.ready_caption", **{name: worker.served[name] for name in _FACTS}))
        if error := worker.served.get("rounding_error"):
            st.caption(f":material/compress: {t('chat.rounded', percent=f'{100 * error:.2f}')}")
        _api(worker)
    return worker


_FACTS = ("device", "dtype", "template", "max_tokens")


def _serves(worker: Worker, model: ChatModel) -> bool:
    adapter = str(model.adapter.absolute()) if model.adapter else None
    return (worker.details.get("model"), worker.details.get("adapter")) == (str(model.path.absolute()), adapter)


def _load(project: Project, model: ChatModel) -> None:
    try:
        run = start_worker(
            project,
            model.path,
            name=model.name,
            adapter=model.adapter,
            prompt_template=model.prompt_template,
            device=st.session_state.get("chat_device", "auto"),
            dtype=st.session_state.get("chat_dtype", "auto"),
        )
    except DanluError as error:
        show_error(error)
        return
    note("start", run.id)
    st.session_state["chat_run"] = str(run.path)
    st.rerun()


def _loading(run: RunDirectory) -> None:
    worker = read_worker(run)
    if worker.served or not worker.status.phase.is_active:
        st.rerun()
    try:
        progress = read_json(run.progress_file)
    except DanluError:
        progress = None
    if worker.status.phase is Phase.QUEUED:
        st.info(waiting_text(worker.status), icon=":material/hourglass:")
        return
    if progress is None:
        st.progress(0.0, text=t("chat.loading", name=worker.name) + " · " + t("chat.starting"))
        return
    done, total = progress["done"], progress["total"] or 1
    words = [t("chat.loading", name=worker.name), say(Message.from_json(progress["message"]))]
    st.progress(min(done / total, 1.0), text=" · ".join([*words, f"{gib(done)} / {gib(total)}"]))


def _why_not(project: Project, chosen: ChatModel) -> None:
    """Why the chosen model is not there: never loaded, base gone, or how its last process ended."""
    if not chosen.is_there:
        st.warning(t("chat.missing_base", name=chosen.name, path=str(chosen.path)), icon=":material/link_off:")
    elif active_runs(project):
        st.warning(t("chat.busy_runs"), icon=":material/memory:")
    last = st.session_state.get("chat_run")
    if not last or not (run := RunDirectory(Path(last))).spec_file.exists():
        return
    worker = read_worker(run)
    if not _serves(worker, chosen):
        return
    if run.error_file.exists():
        show_error(DanluError.from_json(read_json(run.error_file)))
    elif worker.status.signal == _SIGKILL and worker.status.phase is Phase.FAILED:
        st.error(t("chat.killed"), icon=":material/memory:")
    elif worker.status.phase in (Phase.FAILED, Phase.LOST):
        st.error(t("chat.ended", path=str(run.log_file)), icon=":material/error:")
    elif worker.status.phase is Phase.FINISHED:
        st.info(t("chat.idle_ended", name=worker.name), icon=":material/bedtime:")


def _api(worker: Worker) -> None:
    with st.expander(t("chat.api.title"), icon=":material/api:"):
        st.caption(t("chat.api.caption"))
        url = worker.served["url"] if worker.served else ""
        key = worker.run.path / "api_key"
        body = f'{{"model": "{worker.name}", "messages": [{{"role": "user", "content": "hi"}}]}}'
        st.code(
            f"curl {url}/v1/chat/completions \\\n  -H \"Authorization: Bearer $(cat '{key}')\" \\\n"
            f"  -H 'Content-Type: application/json' \\\n  -d '{body}'",
            language="bash",
            wrap_lines=True,
        )
