"""One finding of the checks, as the config page and the launch page show it: what is wrong, where, and the button that mends it."""

from collections.abc import Callable

import streamlit as st

from core.config.findings import Finding, Severity
from pages.ui.text import say, t

_ICONS = {
    Severity.ERROR: ":red[:material/error:]",
    Severity.WARNING: ":orange[:material/warning:]",
    Severity.ADVICE: ":blue[:material/info:]",
}


def finding_card(
    finding: Finding, *, key: str, on_fix: Callable[[Finding], None] | None, is_wide: bool = False
) -> None:
    """`on_fix`: what the button does; None: this page cannot mend it. `is_wide`: there is room for the button beside the words."""
    place = f" :gray[{t('config.checks_line', line=finding.line)}]" if finding.line else ""
    with st.container(border=True, horizontal=is_wide, vertical_alignment="center"):
        st.markdown(f"{_ICONS[finding.severity]} {say(finding.message)}{place}", width="stretch")
        if finding.fix_message is not None and on_fix is not None:
            st.button(say(finding.fix_message), key=key, on_click=on_fix, args=(finding,))
