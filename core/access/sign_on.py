"""Single sign-on: who of those that an OpenID provider knows may come in. Judges claims; the server's framework verifies and reads them.

"Logged in" alone would admit every account of the provider, so there is a list of addresses or of whole domains.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from core.errors import InputError

PATHS: Final = frozenset({"/auth/login", "/auth/logout", "/oauth2callback"})
"""Of the login itself: Streamlit serves them; nothing of the app lies behind them."""
LOGOUT: Final = "/auth/logout"
LONGEST_DAYS: Final = 7.0
_MOST_REMEMBERED: Final = 10_000

Claims = Mapping[str, Any]


@dataclass(slots=True)
class SignOn:
    """The list, and the two things that only the framework knows."""

    allowed: frozenset[str]
    """Addresses (`ada@example.org`) and domains (`@example.org`), in small letters."""
    claims: Callable[[Mapping[str, str]], Claims | None]
    """What a provider said of the bearer of these cookies, if the cookie's signature holds and it is at most `LONGEST_DAYS` old."""
    login_url: Callable[[], str]
    """Where the login begins."""
    trusts_addresses: bool = False
    """Whether an address counts that the provider does not say it has verified: for a provider of one organisation."""
    _seen: set[bytes] = field(default_factory=set, repr=False)

    def email(self, cookies: Mapping[str, str], host: str) -> str | None:
        """The address behind the cookies: signed, for this host and vouched for, on the list or not."""
        claims = self.claims(cookies)
        if not claims or claims.get("is_logged_in") is not True:
            return None
        if urlsplit(str(claims.get("origin") or "")).netloc != host or not host:
            return None
        email, verified = claims.get("email"), claims.get("email_verified")
        is_vouched_for = verified is True or (verified is None and self.trusts_addresses)
        return email.strip().casefold() if isinstance(email, str) and is_vouched_for else None

    def is_allowed(self, email: str | None) -> bool:
        if not email or email.count("@") != 1 or email.startswith("@"):
            return False
        return email in self.allowed or f"@{email.partition('@')[2]}" in self.allowed

    def is_first_time(self, email: str, address: str) -> bool:
        """Whether this person has not been seen at this address since the server started: for the audit log."""
        key = hashlib.sha256(f"{email}\0{address}".encode()).digest()
        if key in self._seen or len(self._seen) >= _MOST_REMEMBERED:
            return False
        self._seen.add(key)
        return True


def read_list(text: str) -> frozenset[str]:
    """Addresses and domains, separated by commas or spaces. Raises InputError `access.bad_list` for anything else, or none."""
    entries = [entry.casefold() for entry in text.replace(",", " ").split()]
    for entry in entries:
        name, _, domain = entry.rpartition("@")
        if "@" not in entry or "@" in name or "." not in domain.strip("."):
            raise InputError("access.bad_list", entry=entry)
    if not entries:
        raise InputError("access.bad_list", entry="")
    return frozenset(entries)
