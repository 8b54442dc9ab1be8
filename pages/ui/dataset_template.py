"""The template check: XTuner's prompt template against the tokenizer's own chat template, as a coloured diff with a verdict."""

from pathlib import Path

import streamlit as st

from core.data.template_check import TemplateCheck, Verdict, check_template
from core.xtuner.templates import PromptTemplate
from pages.ui.text import t

_BOXES = {
    Verdict.SAME: (st.success, ":material/check_circle:"),
    Verdict.ENDS: (st.success, ":material/check_circle:"),
    Verdict.SYSTEM: (st.warning, ":material/warning:"),
    Verdict.DEFAULT_SYSTEM: (st.info, ":material/info:"),
    Verdict.DIFFERENT: (st.warning, ":material/warning:"),
    Verdict.NO_CHAT_TEMPLATE: (st.info, ":material/info:"),
    Verdict.BROKEN: (st.warning, ":material/warning:"),
}
_COLOURS = {"both": "gray", "xtuner": "orange", "tokenizer": "blue"}


def template_check(template: PromptTemplate, model: Path) -> None:
    found = check_template(template, model)
    is_fine = found.verdict in (Verdict.SAME, Verdict.ENDS)
    icon = ":material/check_circle:" if is_fine else ":material/difference:"
    title = f"{t('dataset.template_check')} · {t(f'dataset.verdict_short.{found.verdict}')}"
    with st.expander(title, icon=icon, expanded=found.verdict in (Verdict.DIFFERENT, Verdict.BROKEN)):
        box, icon = _BOXES[found.verdict]
        box(t(f"dataset.verdict.{found.verdict}", template=template.name, reason=found.reason), icon=icon)
        if found.pieces:
            st.markdown(_coloured(found))
            st.caption(t("dataset.diff_legend", template=template.name))


def _coloured(found: TemplateCheck) -> str:
    """Markdown with one colour a side; line breaks are shown as ⏎, and nothing of the templates is taken for markdown."""
    parts: list[str] = []
    for piece in found.pieces:
        colour = _COLOURS[piece.side]
        lines = piece.text.split("\n")
        for at, line in enumerate(lines):
            is_last = at == len(lines) - 1
            shown = "".join(f"\\{letter}" if letter in "\\`*_[]<>$~#|:{}" else letter for letter in line)
            shown = shown.replace(" ", "\u00a0") + ("" if is_last else "⏎")
            parts.append((f":{colour}-background[{shown}]" if shown else "") + ("" if is_last else "  \n"))
    return "".join(parts)
