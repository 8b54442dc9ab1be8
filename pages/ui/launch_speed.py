"""The speed panel of the launch page: the layer as a whole, each of its parts, and the fastest setting as measured."""

from pathlib import Path
from typing import Any

import streamlit as st

from core.project import Project
from core.xtuner.runtime.speed import parts
from pages.ui.launch_autotune import autotune
from pages.ui.text import t

_COLUMNS = 3


def speed_choice(project: Project, config: Path, gpus: tuple[str, ...], *, is_busy: bool) -> str | dict[str, Any]:
    """Draws the switches; what a TrainRequest's `speed` takes. `is_busy`: a run is active."""
    st.caption(t("speed.intro"))
    if not st.toggle(t("speed.on_for_all"), value=True, key="launch_speed", help=t("speed.on_help")):
        return "off"
    columns = st.columns(_COLUMNS)
    chosen = [part for number, part in enumerate(parts.ALL) if _switch(part, columns[number % _COLUMNS])]
    st.caption(t("speed.choose_help"))
    measured = autotune(project, config, gpus[0] if gpus else None, is_busy=is_busy)
    named = measured.get("parts", "auto")
    wanted = chosen if named == "auto" else [part for part in chosen if part in named]
    if len(wanted) == len(parts.ALL) and not measured:
        return "auto"
    return {**measured, "parts": wanted}


def _switch(part: str, place: Any) -> bool:
    # The other parts are built into the fast pass; the optimizer is not.
    needs_pass = part not in (parts.FAST_PASS, parts.OPTIMIZER)
    is_idle = needs_pass and not st.session_state.get(f"launch_speed_{parts.FAST_PASS}", True)
    is_on = place.checkbox(
        t(f"speed.parts.{part}"),
        value=True,
        key=f"launch_speed_{part}",
        help=t(f"speed.does.{part}"),
        disabled=is_idle,
    )
    return bool(is_on) and not is_idle
