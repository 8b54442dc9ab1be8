"""The measured part of the speed panel: what was found for this model and card, the button that measures, the one that applies."""

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core.config.library import change_config, read_config
from core.config.source import ConfigSource
from core.errors import DanluError
from core.project import Project
from core.runs import speed_table
from core.runs.autotune import KIND, start_autotune
from core.runs.jobs import active_jobs
from core.runs.speed_table import Measured, Setting, Table
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.jobs import job_panel
from pages.ui.text import gib, show_error, t

_NONE = "–"


def autotune(project: Project, config: Path, gpu: str | None, *, is_busy: bool) -> dict[str, Any]:
    """Draws it; what a launch adds to the wish for the speed layer: nothing before a person has consented. `is_busy`: a run is active.

    Without a local model there is nothing to measure; the page's checks say so.
    """
    source = ConfigSource(read_config(config))
    try:
        speed_table.model_folder(project, source)
    except DanluError:
        return {}
    st.divider()
    st.markdown(f"**{t('speed.tune.title')}**")
    st.caption(t("speed.tune.intro"))
    table = speed_table.remembered(project, source, gpu=gpu)
    if table is not None:
        _show(table, speed_table.card_name(gpu))
    if is_busy:
        st.caption(f":orange[{t('speed.tune.busy')}]")
    is_measuring = bool(active_jobs(project, (KIND,)))
    with st.container(horizontal=True):
        st.button(
            t("speed.tune.start" if table is None else "speed.tune.again"), key="launch_tune", icon=":material/timer:",
            disabled=is_measuring, on_click=_start, args=(project, config, gpu),
        )  # fmt: skip
        if table is not None and table.best is not None and not table.applied:
            st.button(
                t("speed.tune.apply"), key="launch_tune_apply", type="primary", help=t("speed.tune.apply_help"),
                on_click=_apply, args=(project, config, table.best.setting, gpu),
            )  # fmt: skip
    job_panel(project, (KIND,))
    if table is None or table.best is None or not table.applied:
        return {}
    st.caption(f":green[{t('speed.tune.applied', setting=_words(table.best))}]")
    wish = table.best.setting.speed
    return dict(wish) if isinstance(wish, dict) else {}


def _show(table: Table, card: str) -> None:
    base = table.stock.tokens_per_second if table.stock else None
    rows = [
        {
            t("speed.tune.setting"): _words(row),
            t("speed.tune.rate"): f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else _NONE,
            t("speed.tune.gain"): f"{row.tokens_per_second / base:.1f}×" if row.tokens_per_second and base else _NONE,
            t("speed.tune.memory"): gib(row.memory_bytes) if row.memory_bytes else _NONE,
            t("speed.tune.note"): t("speed.tune.fastest") if row == table.best else _failure(row),
        }
        for row in table.rows
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True)
    st.caption(t("speed.tune.measured_at", card=card, at=table.at.replace("T", " ").partition("+")[0] + " UTC"))


def _words(row: Measured) -> str:
    setting = row.setting
    if setting.speed != "off" and row.parts:
        is_packed = isinstance(setting.speed, dict) and setting.speed.get("parts", "auto") != "auto"
        return t("speed.tune.fast_packed" if is_packed else "speed.tune.fast", tokens=f"{row.tokens_per_pass or 0:,}")
    checkpointing = t(f"speed.tune.checkpointing_{'on' if setting.checkpointing else 'off'}")
    return t(
        "speed.tune.stock", batch=setting.batch_size, accumulation=setting.accumulation, checkpointing=checkpointing
    )


def _failure(row: Measured) -> str:
    if row.failure is None:
        return ""
    if row.failure == "train.out_of_memory":
        return t("speed.tune.failed_memory")
    return t("speed.tune.failed", error=row.failure.splitlines()[-1])


def _start(project: Project, config: Path, gpu: str | None) -> None:
    python = shell.settings().python
    try:
        start_autotune(project, config, gpu=gpu, python=str(python) if python else None)
        note("start", f"autotune {config.name}")
    except DanluError as error:
        show_error(error)


def _apply(project: Project, config: Path, best: Setting, gpu: str | None) -> None:
    try:
        source = ConfigSource(read_config(config))
        if speed_table.apply(source, best).text != source.text:
            change_config(project, config.stem, lambda text: speed_table.apply(text, best))
        speed_table.remember_consent(project, source, gpu=gpu)
    except DanluError as error:
        show_error(error)
