"""What training will see: a row with its template, learned tokens in colour, token lengths, and how long a run would be."""

from itertools import groupby
from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st

from core.data import library, statistics
from core.data.arithmetic import Plan, plan_iterations
from core.data.formats import Format
from core.data.library import Dataset
from core.data.preview import Token, training_segments, training_tokens_of
from core.data.statistics import LengthSummary
from core.data.tokenizer import load_tokenizer, model_folders, tokenizer_file
from core.errors import DanluError
from core.models.remote_code import is_allowed
from core.project import Project
from core.runs.launch import start_job
from core.xtuner.templates import PromptTemplate, prompt_templates
from core.xtuner.tokens import guess_template
from pages.ui import shell
from pages.ui.audit import note
from pages.ui.dataset_template import template_check
from pages.ui.text import show_error, t

_SHOWN_TOKENS = 1500
_SHOWN_LINES = 20
_MEASURE_AT_ONCE_BYTES = 2 * 2**20


def learned_view(project: Project, dataset: Dataset) -> None:
    models = model_folders(project)
    if not models:
        shell.missing(t("dataset.needs_model"), "model")
        return
    if dataset.format is Format.UNKNOWN:
        st.info(t("dataset.needs_format"), icon=":material/help:")
        return
    cells = st.columns([3, 2, 2, 2])
    model = cells[0].selectbox(
        t("dataset.model"),
        models,
        format_func=lambda folder: folder.name,
        key="dataset_model",
        help=t("dataset.model_help"),
    )
    template = _choose_template(cells[1], dataset, model)
    max_length = int(
        cells[2].number_input(
            t("dataset.max_length"),
            16,
            1_048_576,
            2048,
            step=128,
            key="dataset_max_length",
            help=t("dataset.max_length_help"),
        )
    )
    last = max(1, dataset.rows or 1_000_000)
    number = int(
        cells[3].number_input(
            t("dataset.row_number"), 1, last, 1, key=f"dataset_row_{dataset.name}", help=t("dataset.row_number_help")
        )
    )
    if template is not None:
        template_check(template, model)
    if tokenizer_file(project, model) is None:
        _export_form(project, model)
        return
    try:
        _row(project, dataset, model, template, max_length, number)
        _lengths(project, dataset, model, template, max_length)
    except DanluError as error:
        show_error(error)


def _choose_template(cell: st.delta_generator.DeltaGenerator, dataset: Dataset, model: Path) -> PromptTemplate | None:
    if not dataset.has_template:
        cell.selectbox(
            t("dataset.template"),
            [t("dataset.no_template")],
            disabled=True,
            key="dataset_no_template",
            help=t("dataset.template_help"),
        )
        return None
    templates = prompt_templates()
    guess = guess_template(model) or "default"
    name = cell.selectbox(
        t("dataset.template"),
        list(templates),
        index=list(templates).index(guess),
        key=f"dataset_template_{model}",
        help=t("dataset.template_help"),
    )
    return templates[name]


def _export_form(project: Project, model: Path) -> None:
    if not is_allowed(project, model):
        shell.missing(t("dataset.code_not_allowed"), "model")
        return
    st.warning(t("dataset.tokenizer_code"), icon=":material/code:")
    if st.button(t("dataset.tokenizer_go"), key="dataset_tokenizer_go"):
        arguments = {"project": str(project.root), "model_folder": str(model)}
        start_job(
            project,
            "core.data.tokenizer:export_tokenizer",
            kind="data_tokenizer",
            title=model.name,
            arguments=arguments,
        )
        note("start", f"data_tokenizer {model.name}")
        st.rerun()


def _row(  # noqa: PLR0917
    project: Project, dataset: Dataset, model: Path, template: PromptTemplate | None, max_length: int, number: int
) -> None:
    rows = library.browse(dataset.path, offset=number - 1, count=1).rows
    if not rows:
        st.info(t("dataset.no_rows_found"), icon=":material/search_off:")
        return
    tokenizer = load_tokenizer(project, model)
    segments = training_segments(rows[0].value, dataset.format, dataset.detection.columns, template, tokenizer)
    tokens = training_tokens_of(segments, tokenizer, max_length)
    learned = sum(token.is_learned and not token.is_cut for token in tokens)
    with st.container(border=True):
        st.markdown(coloured(tokens[:_SHOWN_TOKENS]))
    left, right = st.columns([4, 1])
    left.caption(t("dataset.legend", tokens=len(tokens), learned=learned))
    if not learned:
        st.warning(t("dataset.nothing_learned"), icon=":material/content_cut:")
    if right.toggle(t("dataset.show_tokens"), key="dataset_show_tokens"):
        marks = {True: t("dataset.is_learned"), False: "—"}
        table = [
            {"#": at, "id": token.id, t("dataset.token"): token.text, t("dataset.is_learned"): marks[token.is_learned]}
            for at, token in enumerate(tokens[:_SHOWN_TOKENS])
        ]
        st.dataframe(table, hide_index=True, width="stretch", height=260)


def coloured(tokens: list[Token]) -> str:
    """Markdown: learned text on green, the rest on grey, what is cut off on red. Nothing of the data is taken for markdown."""
    parts: list[str] = []
    for colour, run in groupby(
        tokens, key=lambda token: "red" if token.is_cut else "green" if token.is_learned else "gray"
    ):
        text = "".join(token.text for token in run)
        lines = text.split("\n")
        for at, line in enumerate(lines):
            is_last = at == len(lines) - 1
            shown = _escape(line) + ("" if is_last else "⏎")
            parts.append((f":{colour}-background[:{colour}[{shown}]]" if shown else "") + ("" if is_last else "  \n"))
    return "".join(parts)


def _escape(text: str) -> str:
    """Every punctuation mark escaped, runs of spaces kept, and pairs that Streamlit would turn into arrows and dashes held apart."""
    escaped = "".join(
        f"\\{letter}" if letter.isascii() and not letter.isalnum() and not letter.isspace() else letter
        for letter in text
    )
    for pair in ("\\-\\-", "\\-\\>", "\\<\\-"):
        escaped = escaped.replace(pair, f"{pair[:2]}\u2060{pair[2:]}")
    return escaped.replace("  ", "\u00a0\u00a0").replace("\t", "\u2003")


def _lengths(project: Project, dataset: Dataset, model: Path, template: PromptTemplate | None, max_length: int) -> None:
    lengths = statistics.load_lengths(project, dataset.path, model, template)
    if lengths is None and dataset.size_bytes <= _MEASURE_AT_ONCE_BYTES:
        with st.spinner(t("data.progress.measure")):
            lengths = statistics.measure(project, dataset.path, dataset.detection, model, template)
    if lengths is None:
        if st.button(t("dataset.measure_go"), icon=":material/straighten:", key="dataset_measure_go"):
            arguments = {
                "project": str(project.root),
                "data_path": str(dataset.path),
                "detection": dataset.detection.to_json(),
                "model_folder": str(model),
                "template": template.to_json() if template else None,
            }
            start_job(
                project,
                "core.data.statistics:measure_job",
                kind="data_measure",
                title=dataset.name,
                arguments=arguments,
            )
            note("start", f"data_measure {dataset.name}")
            st.rerun()
        return
    st.markdown(f"##### {t('dataset.lengths')}")
    summary = lengths.summary(max_length)
    left, right = st.columns([3, 2])
    with left:
        _histogram(lengths.histogram(), max_length)
    with right:
        _facts(summary, lengths.unusable_rows)
    if dropped := lengths.dropped_lines(max_length):
        shown = ", ".join(map(str, dropped[:_SHOWN_LINES])) + (" …" if len(dropped) > _SHOWN_LINES else "")
        said = t("dataset.prompt_too_long", count=f"{len(dropped):,}", max_length=max_length, lines=shown)
        st.warning(said, icon=":material/content_cut:")
    _plan(summary)


def _histogram(bins: list[tuple[int, int, int]], max_length: int) -> None:
    frame = pd.DataFrame(bins, columns=["start", "end", "rows"])
    x = alt.X("start:Q", bin="binned", title=t("dataset.tokens_of_row"))
    bars = (
        alt.Chart(frame)
        .mark_bar()
        .encode(x=x, x2="end:Q", y=alt.Y("rows:Q", title=t("dataset.rows")), tooltip=["start", "end", "rows"])
    )
    if bins and max_length <= bins[-1][1]:
        mark = (
            alt.Chart(pd.DataFrame({"x": [max_length]})).mark_rule(color="#BE123C", strokeDash=[4, 3]).encode(x="x:Q")
        )
        st.altair_chart(bars + mark, height=210)
    else:
        st.altair_chart(bars, height=210)


def _facts(summary: LengthSummary, unusable_rows: int) -> None:
    rows = max(1, summary.rows)
    facts = {
        t("dataset.percentiles"): f"{summary.p50:,} / {summary.p90:,} / {summary.p99:,} / {summary.longest:,}",
        t("dataset.total_tokens"): f"{summary.total_tokens:,}",
        t("dataset.truncated"): f"{100 * summary.truncated_rows / rows:.1f}% ({summary.truncated_rows:,})",
        t("dataset.dropped_rows"): f"{summary.dropped_rows + unusable_rows:,}",
        t("dataset.suggested"): f"{summary.suggested_max_length:,}",
        t("dataset.packed"): f"{summary.packing.samples:,}",
        t("dataset.packing_loss"): f"{100 * summary.packing.lost_share:.1f}% ({summary.packing.lost_tokens:,})",
    }
    st.dataframe(
        [{t("dataset.fact"): key, t("dataset.value"): value} for key, value in facts.items()],
        hide_index=True,
        width="stretch",
    )


def _plan(summary: LengthSummary) -> None:
    with st.expander(t("dataset.plan"), icon=":material/calculate:"):
        st.caption(t("dataset.plan_intro"))
        cells = st.columns(6)
        batch = cells[0].number_input(
            t("dataset.batch_size"), 1, 4096, 1, key="dataset_batch", help=t("dataset.batch_size_help")
        )
        accumulation = cells[1].number_input(
            t("dataset.accumulation"), 1, 4096, 16, key="dataset_accumulation", help=t("dataset.accumulation_help")
        )
        epochs = cells[2].number_input(
            t("dataset.epochs"), 1, 1000, 3, key="dataset_epochs", help=t("dataset.epochs_help")
        )
        gpus = cells[3].number_input(t("dataset.gpus"), 1, 4096, 1, key="dataset_gpus", help=t("dataset.gpus_help"))
        warmup = cells[4].number_input(
            t("dataset.warmup"), 0.0, 0.5, 0.03, 0.01, key="dataset_warmup", help=t("dataset.warmup_help")
        )
        packs = cells[5].checkbox(t("dataset.packs"), value=True, key="dataset_packs")
        plan: Plan = plan_iterations(
            summary.packing.samples if packs else summary.rows - summary.dropped_rows,
            batch_size=int(batch),
            accumulative_counts=int(accumulation),
            max_epochs=int(epochs),
            world_size=int(gpus),
            warmup_ratio=float(warmup),
        )
        cells = st.columns(4)
        cells[0].metric(t("dataset.samples"), f"{plan.samples:,}")
        cells[1].metric(t("dataset.iterations"), f"{plan.iterations:,}")
        cells[2].metric(t("dataset.steps"), f"{plan.optimizer_steps:,}")
        cells[3].metric(t("dataset.warmup_iterations"), f"{plan.warmup_iterations:,}")
        if warmup and not plan.is_warmup_possible:
            st.warning(t("dataset.no_warmup"), icon=":material/warning:")
