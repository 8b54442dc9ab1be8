"""The memory panel of the launch page: a bar for each GPU, what would make it fit, and the button that fits it."""

from dataclasses import replace
from typing import Final

import altair as alt
import pandas as pd
import streamlit as st

from core.config.dry_run import write_dry_run
from core.config.memory import comparison
from core.config.memory.budget import Budget, Verdict, read_budget
from core.config.memory.fitting import Fit, Option, fit, options, saved_bytes
from core.config.memory.measured import Key, correction
from core.config.memory.moments import Part
from core.config.memory.setup import model_folder
from core.errors import InputError
from core.files import free_path
from core.launchers.local import list_gpus
from core.models.inspect import fingerprint
from core.project import Project
from core.runs.request import TrainRequest
from core.runs.start import Start
from core.runs.train import start_training
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.launch_views import apply_change
from pages.ui.text import gib, say, span, t

_CARD_SIZES: Final = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)
_COLOURS: Final = ("#9A3412", "#EA580C", "#CA8A04", "#65A30D", "#0F766E", "#0284C7", "#7C3AED", "#78716C")
_LIMIT_COLOUR: Final = "#857C75"
"""Of the line where the memory ends: to be seen on white and on black."""
_VERDICTS: Final = {Verdict.FITS: "green", Verdict.TIGHT: "orange", Verdict.TOO_LARGE: "red"}
_GIB: Final = 2**30


def memory_panel(project: Project, start: Start) -> str | None:
    """The budget of this start, or why there is none. Returns it in one badge for the bar."""
    request = start.request
    st.subheader(t("budget.title"), divider="gray")
    cards = {gpu.uuid: gpu for gpu in list_gpus() if gpu.uuid in request.gpus or str(gpu.index) in request.gpus}
    free = {t("budget.gpu", index=card.index): card.memory_bytes - card.used_bytes for card in cards.values()}
    if not free:
        size = st.selectbox(
            t("budget.card"),
            _CARD_SIZES,
            index=_CARD_SIZES.index(24),
            format_func=lambda gigabytes: t("budget.card_size", size=gigabytes),
            key="launch_card_size",
            help=t("budget.card_help"),
        )
        free = {t("budget.assumed"): size * _GIB}
    smallest = min(free.values())
    try:
        budget = _budget(project, start, smallest, next((card.name for card in cards.values()), None))
    except InputError as error:
        st.caption(" ".join(say(part) for part in (error.what, error.next)))
        return None
    _bars(budget, free)
    _words(budget, smallest, count=len(free))
    _ways(project, request, budget, smallest)
    return _badge(budget, smallest, has_card=bool(cards))


def _badge(budget: Budget, free_bytes: int, *, has_card: bool) -> str:
    """Without a card there is nothing to fit into: only what one would need."""
    size = span(*(gib(size) for size in budget.shown_bytes))
    if not has_card:
        return f":gray-badge[:material/memory: {t('launch.bar.would_need', size=size)}]"
    verdict = budget.verdict(free_bytes)
    words = t(f"launch.bar.{verdict}", size=size, free=gib(free_bytes))
    return f":{_VERDICTS[verdict]}-badge[:material/memory: {words}]"


def _budget(project: Project, start: Start, free_bytes: int, card: str | None) -> Budget:
    source, around = start.source, start.around
    kept = around.setting.to_json() if around.setting else None
    begun = comparison.start_of(
        {
            "deepspeed": around.deepspeed,
            "deepspeed_config": kept,
            "world_size": start.request.world_size,
            "speed": start.request.speed,
        }
    )
    budget = read_budget(source, begun, free_bytes=free_bytes)
    folder = model_folder(source)
    if card is None or folder is None:
        return budget
    factor = correction(project, Key(fingerprint(folder), card, comparison.way(budget.setup)))
    return budget if factor == 1.0 else read_budget(source, begun, free_bytes=free_bytes, correction=factor)


def _bars(budget: Budget, free: dict[str, int]) -> None:
    """One stacked bar a GPU, a line where its free memory ends."""
    names = {part: t(f"budget.parts.{part}") for part in Part}
    rows = [
        {"gpu": gpu, "part": names[part], "order": number, "size": size / _GIB, "shown": gib(size)}
        for gpu in free
        for number, (part, size) in enumerate(budget.parts.items())
    ]
    ends = pd.DataFrame({"gpu": list(free), "size": [size / _GIB for size in free.values()]})
    ends["shown"] = [t("budget.free", free=gib(size)) for size in free.values()]
    used = [names[part] for part in budget.parts]
    colours = [_COLOURS[list(Part).index(part)] for part in budget.parts]
    scale = alt.Scale(domain=[0, max(sum(budget.parts.values()), *free.values()) / _GIB * 1.05])
    bars = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(height=22)
        .encode(
            x=alt.X("size:Q", title=t("budget.axis"), stack="zero", scale=scale, axis=alt.Axis(grid=False)),
            y=alt.Y("gpu:N", title=None),
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=used, range=colours),
                legend=alt.Legend(title=None, orient="top", columns=4, labelLimit=200),
            ),
            order=alt.Order("order:Q"),
            tooltip=[alt.Tooltip("part:N", title=" "), alt.Tooltip("shown:N", title=" ")],
        )
    )
    rules = (
        alt.Chart(ends)
        .mark_tick(thickness=3, size=34, color=_LIMIT_COLOUR)
        .encode(x=alt.X("size:Q", scale=scale), y="gpu:N", tooltip=[alt.Tooltip("shown:N", title=" ")])
    )
    labels = (
        alt.Chart(ends)
        .mark_text(align="right", dx=-6, dy=-20, color=_LIMIT_COLOUR)
        .encode(x=alt.X("size:Q", scale=scale), y="gpu:N", text="shown:N")
    )
    st.altair_chart(alt.layer(bars, rules, labels).properties(height=100 + 44 * len(free)), width="stretch")


def _words(budget: Budget, free_bytes: int, *, count: int) -> None:
    shown = span(*(gib(size) for size in budget.shown_bytes))
    verdict = budget.verdict(free_bytes)
    lines = [
        f":{_VERDICTS[verdict]}[**{t(f'budget.{verdict}')}**]",
        t("budget.summary", allocated=gib(budget.allocated_bytes), shown=shown),
    ]
    st.markdown(" ".join([*lines, t("budget.per_gpu")] if count > 1 else lines))
    notes = [_path(budget)]
    if budget.correction != 1.0:
        notes.append(t("budget.corrected", factor=f"{budget.correction:.2f}"))
    st.caption(" ".join([*notes, *(say(doubt) for doubt in budget.doubts)]))


def _path(budget: Budget) -> str:
    if budget.fast is None:
        return t("budget.path_stock", moment=t(f"budget.moments.{budget.peak.moment}"))
    return t(
        "budget.path_fast",
        tokens=f"{budget.fast.tokens:,}",
        layers=budget.shape.layers,
        recomputed=budget.fast.recomputed_layers,
        least=gib(budget.fast.least),
    )


def _ways(project: Project, request: TrainRequest, budget: Budget, free_bytes: int) -> None:
    """The button that fits it, and single changes with their price."""
    found = options(budget, free_bytes)
    if budget.fast is None:
        _fit_button(project, request, budget, free_bytes)
    if request.gpus and st.button(
        t("budget.dry_run"), icon=":material/labs:", key="launch_dry_run", help=t("budget.dry_run_help")
    ):
        _prove(project, request)
    if found:
        with st.expander(t("budget.options_title"), expanded=budget.verdict(free_bytes) is Verdict.TOO_LARGE):
            for option in found:
                _option(project, request, budget, option, free_bytes)


def _fit_button(project: Project, request: TrainRequest, budget: Budget, free_bytes: int) -> None:
    best = fit(budget, free_bytes)
    if best is None:
        st.caption(t("budget.fit_none"))
        return
    now = budget.setup
    if (best.batch_size, best.is_checkpointing) == (now.batch_size, now.is_checkpointing):
        st.caption(t("budget.fit_same"))
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            t("budget.fit"),
            icon=":material/fit_screen:",
            key="launch_fit",
            help=t("budget.fit_help"),
            on_click=_apply,
            args=(project, request, best),
        )
        st.caption(_fit_words(best))


def _prove(project: Project, request: TrainRequest) -> None:
    """Start three updates with the real model and data, and watch them."""
    name = free_path(project.train / "dry_run").name
    config = write_dry_run(project, request.config)
    run = start_training(project, replace(request, config=config, name=name, resume=None))
    note("start", run.id)
    st.session_state["monitor_run"] = run.id
    st.switch_page(shell.PAGES["monitor"], query_params={"run": run.id})


def _fit_words(best: Fit) -> str:
    return t(
        "budget.fit_found",
        batch=best.batch_size,
        accumulation=best.accumulation,
        checkpointing=t("budget.fit_on" if best.is_checkpointing else "budget.fit_off"),
        peak=gib(best.budget.allocated_bytes),
        speed=f"{best.speed:.2g}",
    )


def _option(project: Project, request: TrainRequest, budget: Budget, option: Option, free_bytes: int) -> None:
    sizes = {"saved": gib(saved_bytes(budget, option)), "peak": gib(option.budget.needed_bytes)}
    saved = t("budget.saves_fast" if option.budget.fast else "budget.saves", **sizes)
    is_enough = option.budget.verdict(free_bytes) is not Verdict.TOO_LARGE
    mark = f" :green-badge[{t('budget.options_fit')}]" if is_enough else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**{say(option.what)}** · {saved}{mark}  \n:gray[{say(option.price)}]", width="stretch")
        st.button(
            t("budget.apply"), key=f"launch_option_{option.code}", on_click=_apply, args=(project, request, option)
        )


def _apply(project: Project, request: TrainRequest, change: Option | Fit) -> None:
    apply_change(project, request, edit=change.edit, deepspeed=change.deepspeed if isinstance(change, Option) else None)
