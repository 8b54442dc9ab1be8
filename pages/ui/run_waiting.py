"""What a waiting run waits for, and a way to let it begin."""

from pathlib import Path

import streamlit as st

from core.errors import DanluError
from core.runs.control import request_stop
from core.runs.devices import CPU
from core.runs.directory import RunDirectory
from core.runs.jobs import kind_of
from core.runs.state import RunStatus, read_status
from pages.ui.audit import note
from pages.ui.text import show_error, t


def waiting_text(status: RunStatus) -> str:
    """Which device it waits for, and who has it or comes first."""
    parts = [
        t("monitor.waits_for", device=_device(holder.device), run=Path(holder.run).name or "?")
        for holder in status.waits_for
    ]
    return "\n\n".join([*dict.fromkeys(parts), t("monitor.waits_note")])


def waiting_note(status: RunStatus) -> None:
    """The same in a box; a chat that holds the device can be ended from here."""
    st.info(waiting_text(status), icon=":material/hourglass:")
    holders = {holder.run: RunDirectory(Path(holder.run)) for holder in status.waits_for if holder.run}
    for path, run in holders.items():
        is_chat = kind_of(run) == "chat" and read_status(run).phase.is_active
        if is_chat and st.button(
            t("monitor.end_chat"), key=f"monitor_end_chat_{run.id}", icon=":material/eject:", help=path
        ):
            try:
                request_stop(run, "cancel")
                note("cancel", run.id)
            except DanluError as error:
                show_error(error)


def _device(name: str) -> str:
    return t("monitor.device_cpu") if name == CPU else name[:12]
