"""Who may come in, decided once when the server starts, and the log of who came. Draws nothing."""

import os
import sys

import streamlit as st

from core import settings
from core.access import audit
from core.access.policy import Policy, choose_policy
from core.errors import DanluError
from core.i18n import catalog, guess_language
from pages.ui.sign_on import make_sign_on


def policy() -> Policy:
    """The policy for the address this server listens on. Ends the start with the reason in words if it cannot hold."""
    words = catalog(guess_language(os.environ.get("LANG")))
    try:
        return choose_policy(
            st.get_option("server.address") or "",
            announce=lambda token: print(words.text("access.announce", token=token), flush=True),
            make_sign_on=make_sign_on,
        )
    except DanluError as error:
        print("\n".join(words.explain(error)), file=sys.stderr)
        raise SystemExit(1) from None


def record(action: str, address: str, who: str) -> None:
    """Write a login, or a failed one, into the audit log."""
    audit.record(settings.load().home, action, who=who, address=address)
