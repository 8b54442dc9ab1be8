"""A box for source text: a text area in the font of code whose lines are not broken, so that a line and a column can be found."""

from typing import Any, Final

import streamlit as st

_STYLE: Final = """<style>[class*='st-key-code_box_'] textarea {
    font-family: 'Source Code Pro', 'Noto Sans Mono CJK SC', monospace; font-size: 0.8125rem; line-height: 1.5;
    white-space: pre; overflow-x: auto; tab-size: 4;
}</style>"""
"""The theme has no option for it, and Streamlit no editor for code."""


def code_box(label: str, *args: Any, key: str, **options: Any) -> str:
    """Streamlit's text area. It has no line numbers: what is wrong is shown with its line beside the box."""
    st.html(_STYLE)
    with st.container(key=f"code_box_{key}"):
        return str(st.text_area(label, *args, key=key, **options))
