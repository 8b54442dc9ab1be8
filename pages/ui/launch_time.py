"""Time and cost of a training, on the launch page."""

from collections.abc import Sequence

import streamlit as st

from core.config.duration import Duration, estimate_duration, names, rate, set_rate
from core.launchers.local import list_gpus
from core.project import Project
from core.runs.jobs import Listed
from core.runs.start import Start
from core.xtuner.runtime.speed.parts import FAST_PASS, Wish
from pages.ui.text import duration, span, t


def time_panel(project: Project, start: Start, runs: Sequence[Listed]) -> str | None:
    """How many steps, how long, and what it costs if a price is set. Returns it in one badge for the bar."""
    request = start.request
    card = next((gpu.name for gpu in list_gpus() if {gpu.uuid, str(gpu.index)} & set(request.gpus)), None)
    found = estimate_duration(
        runs,
        start.source,
        start.context,
        card=card,
        is_fast=FAST_PASS in Wish.from_json(request.speed) and request.deepspeed is None,
    )
    if found is None:
        st.caption(t("budget.time.no_data"))
        return None
    price = 0.0
    left = st.container()
    if card:
        left, right = st.columns([4, 1], vertical_alignment="bottom")
        with right:
            price = _price(project, card)
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
    steps, updates = (span(*(f"{number:,}" for number in numbers)) for numbers in (found.iterations, found.updates))
    return t("budget.time.size", steps=steps, updates=updates, tokens=f"{found.tokens_per_update:,}")


def _time(found: Duration) -> str:
    if found.seconds is None:
        return ""
    low, high = (duration(seconds) for seconds in found.seconds)
    return t("budget.time.takes_about", low=low) if low == high else t("budget.time.takes", low=low, high=high)


def _short(found: Duration) -> str:
    if found.seconds is None:
        return t("launch.bar.steps", steps=span(*(f"{number:,}" for number in found.iterations)))
    low, high = (duration(seconds) for seconds in found.seconds)
    return t("launch.bar.about", low=low) if low == high else t("launch.bar.takes", low=low, high=high)


def _cost(found: Duration, price: float, cards: int) -> str:
    cost = found.cost(price, cards)
    if cost is None or not price:
        return ""
    return t("budget.time.cost", low=f"{cost[0]:,.2f}", high=f"{cost[1]:,.2f}", cards=cards)
