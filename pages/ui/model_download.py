"""The form that downloads a base model: look up first, see the size, then start; and what earlier downloads left behind."""

import shutil
from typing import Any

import streamlit as st

from core.errors import DanluError
from core.models.download import SPARE_BYTES, Unfinished, discard, unfinished_downloads
from core.models.hubs import HUBS, MIRRORS, OFFICIAL, Listing, open_hub
from core.models.library import free_name
from core.project import Project
from core.runs.jobs import active_jobs
from core.runs.launch import start_job
from pages.ui.audit import note
from pages.ui.model_cards import KINDS
from pages.ui.text import gib, show_error, t

_HUB_NAMES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_EXAMPLES = {"huggingface": "Qwen/Qwen2.5-0.5B-Instruct", "modelscope": "Shanghai_AI_Laboratory/internlm2-chat-1_8b"}


def download_form(project: Project) -> None:
    left, middle, right = st.columns([2, 4, 1], vertical_alignment="bottom")
    hub = left.segmented_control(
        t("model.hub"),
        list(HUBS),
        default=HUBS[0],
        format_func=_HUB_NAMES.__getitem__,
        key="model_hub",
        required=True,
    )
    hub = hub or HUBS[0]
    repo = middle.text_input(
        t("model.repo"), key="model_repo", placeholder=_EXAMPLES[hub], help=t("model.repo_help")
    ).strip()
    with st.expander(t("model.mirror"), icon=":material/dns:"):
        cells = st.columns([3, 2])
        places = [open_hub(hub).endpoint, OFFICIAL[hub], *(MIRRORS if hub == "huggingface" else ())]
        endpoint = cells[0].selectbox(
            t("model.endpoint"),
            list(dict.fromkeys(places)),
            key=f"model_endpoint_{hub}",
            accept_new_options=True,
            help=t("model.endpoint_help"),
        )
        revision = cells[1].text_input(t("model.revision"), key="model_revision", help=t("model.revision_help")).strip()
    if right.button(t("model.look_up"), key="model_look_up", disabled=not repo, width="stretch"):
        st.session_state["model_listing"] = None
        try:
            with st.spinner(t("models.progress.looking_up", repo=repo)):
                st.session_state["model_listing"] = _as_plain(open_hub(hub, str(endpoint)).listing(repo, revision))
        except DanluError as error:
            show_error(error)
    listing = st.session_state.get("model_listing")
    if listing and listing["repo"] == repo and listing["hub"] == hub:
        _show_listing(listing, project)


def show_unfinished(project: Project) -> None:
    """What cut downloads left: go on with it, or delete it."""
    if active_jobs(project, ("download",)):
        return
    for item in unfinished_downloads(project):
        with st.container(border=True):
            text, go, drop = st.columns([5, 1, 1], vertical_alignment="center")
            have = t("model.unfinished", repo=item.repo, have=gib(item.have_bytes), total=gib(item.total_bytes))
            text.markdown(f":material/downloading: {have}")
            if go.button(t("model.go_on"), key=f"model_go_on_{item.path.name}", type="primary", width="stretch"):
                _start(project, item.repo, item.arguments())
            if drop.button(t("model.discard"), key=f"model_discard_{item.path.name}", width="stretch"):
                _discard(project, item)


def _discard(project: Project, item: Unfinished) -> None:
    try:
        discard(project, item.path)
    except DanluError as error:
        show_error(error)
        return
    note("delete", f"download {item.repo}")
    st.rerun()


def _as_plain(listing: Listing) -> dict[str, Any]:
    """For session state, which outlives the classes of core on a hot reload."""
    files = [(file.path, file.size_bytes, file.digest is not None) for file in listing.files]
    return {
        "hub": listing.hub,
        "endpoint": listing.endpoint,
        "repo": listing.repo,
        "revision": listing.revision,
        "name": listing.name,
        "total_bytes": listing.total_bytes,
        "left_out_bytes": listing.left_out_bytes,
        "files": files,
    }


def _show_listing(listing: dict[str, Any], project: Project) -> None:
    free = shutil.disk_usage(project.root).free
    fits = free > listing["total_bytes"] + SPARE_BYTES
    values = {"size": gib(listing["total_bytes"]), "count": len(listing["files"]), "free": gib(free)}
    (st.info if fits else st.error)(
        t("model.listing" if fits else "model.listing_too_large", **values), icon=":material/cloud_download:"
    )
    notes = [t("model.left_out", size=gib(listing["left_out_bytes"]))] if listing["left_out_bytes"] > 2**20 else []
    notes += [t("model.unverified")] if not all(has_digest for _, _, has_digest in listing["files"]) else []
    if notes:
        st.caption(" ".join(notes))
    with st.expander(t("model.files", count=len(listing["files"]))):
        rows = sorted(listing["files"], key=lambda file: -file[1])
        st.table({t("model.file"): [name for name, _, _ in rows], t("model.size"): [gib(size) for _, size, _ in rows]})
    left, right = st.columns([4, 2], vertical_alignment="bottom")
    name = left.text_input(
        t("model.folder_name"),
        listing["name"],
        key=f"model_download_name_{listing['repo']}",
        help=t("model.folder_name_help"),
    ).strip()
    is_busy = bool(active_jobs(project, KINDS))
    if right.button(
        t("model.download_go"),
        type="primary",
        icon=":material/download:",
        key="model_download",
        disabled=is_busy or not fits,
        width="stretch",
    ):
        try:
            target = str(free_name(project, name))
        except DanluError as error:
            show_error(error)
            return
        arguments = {key: listing[key] for key in ("hub", "endpoint", "repo", "revision")}
        st.session_state["model_listing"] = None
        _start(project, listing["repo"], {**arguments, "target": target})


def _start(project: Project, title: str, arguments: dict[str, Any]) -> None:
    start_job(project, "core.models.download:download_model", kind="download", title=title, arguments=arguments)
    note("start", f"download {title}")
    st.rerun()
