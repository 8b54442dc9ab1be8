"""How far tokenising is, on the monitor: before the first step of a run whose data was not tokenised before."""

import streamlit as st

from core.errors import DanluError
from core.files import read_json
from core.messages import Message
from core.runs.directory import RunDirectory
from pages.ui.text import t


def tokenising_note(run: RunDirectory) -> bool:
    """Shows it; whether there was anything to show."""
    try:
        value = read_json(run.progress_file)
        step = Message.from_json(value["message"]).params["step"]
        done, total = float(value["done"]), value["total"]
    except (DanluError, KeyError, TypeError, ValueError):
        return False
    if not total:
        st.progress(0.0, text=t("monitor.tokenising_open", step=step))
    else:
        words = t("monitor.tokenising", step=step, done=f"{done:,.0f}", total=f"{total:,.0f}")
        st.progress(min(1.0, done / total), text=words)
    return True
