"""Time and cost of a training, on the launch page."""

import streamlit as st

from core.config.checks import gather
from core.config.duration import Duration, estimate_duration, names, rate, set_rate
from core.config.library import read_config
from core.config.source import ConfigSource
from core.launchers.local import list_gpus
from core.project import Project
from core.runs.train import TrainRequest, surroundings
from core.xtuner.runtime.speed.parts import FAST_PASS, Wish
from pages.ui.text import duration, t


def time_panel(project: Project, request: TrainRequest) -> str | None:
    """How many steps, how long, and what it costs if a price is set. Returns it in one badge for the bar."""
    source = ConfigSource(read_config(request.config))
    card = next((gpu.name for gpu in list_gpus() if {gpu.uuid, str(gpu.index)} & set(request.gpus)), None)
    found = estimate_duration(
        project,
        source,
        gather(source, surroundings(project, request)),
        card=card,
        is_fast=FAST_PASS in Wish.from_json(request.speed) and request.deepspeed is None,
    )
    if found is None:
        st.caption(t("budget.time.no_data"))
        return None
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    with right:
        price = _price(project, card) if card else 0.0
    with left:
        st.markdown(" ".join([_size(found), _time(found), _cost(found, price, len(request.gpus))]))
        st.caption(t(f"budget.time.{found.basis}", runs=names(found.runs), card=card or "?"))
    return f":gray-badge[:material/schedule: {_short(found)}]"


def _price(project: Project, card: str) -> float:
    key = "launch_rate"
    value = st.number_input(
        t("budget.time.rate"),
        min_value=0.0,
        value=rate(project, card),
        step=0.5,
        key=key,
        help=t("budget.time.rate_help"),
        on_change=lambda: set_rate(project, card, float(st.session_state[key])),
    )
    return float(value)


def _size(found: Duration) -> str:
    (low, high), (few, most) = found.iterations, found.updates
    numbers = {"low": low, "high": high, "updates_low": few, "updates_high": most, "tokens": found.tokens_per_update}
    return t("budget.time.size", **{name: f"{value:,}" for name, value in numbers.items()})


def _time(found: Duration) -> str:
    if found.seconds is None:
        return ""
    low, high = (duration(seconds) for seconds in found.seconds)
    return t("budget.time.takes_about", low=low) if low == high else t("budget.time.takes", low=low, high=high)


def _short(found: Duration) -> str:
    if found.seconds is None:
        low, high = found.iterations
        return t("launch.bar.steps", low=f"{low:,}", high=f"{high:,}")
    low, high = (duration(seconds) for seconds in found.seconds)
    return t("launch.bar.about", low=low) if low == high else t("launch.bar.takes", low=low, high=high)


def _cost(found: Duration, price: float, cards: int) -> str:
    cost = found.cost(price, cards)
    if cost is None or not price:
        return ""
    return t("budget.time.cost", low=f"{cost[0]:,.2f}", high=f"{cost[1]:,.2f}", cards=cards)
