"""Who gets in: everyone on loopback, else whoever has the password, the token printed at start, or an address on the list of a
single sign-on. Decides; serves nothing.
"""

import ipaddress
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.access.passwords import hash_password, is_password
from core.access.sign_on import SignOn, read_list
from core.errors import InputError

PASSWORD_VARIABLE = "DANLU_PASSWORD"  # noqa: S105 - the name of a variable
HASH_VARIABLE = "DANLU_PASSWORD_HASH"
EMAILS_VARIABLE = "DANLU_OIDC_EMAILS"
TRUST_VARIABLE = "DANLU_OIDC_TRUST_ADDRESSES"
SignOnMaker = Callable[[frozenset[str], bool], SignOn]
"""Makes the single sign-on of a list and of whether unverified addresses count. Raises DanluError if the server is not set up for it."""


@dataclass(slots=True)
class Policy:
    """What a login must show. Without a password, a token and a single sign-on nobody has to log in."""

    password_hash: str | None = None
    has_token: bool = False
    sign_on: SignOn | None = None
    announce: Callable[[str], None] = print
    """Told each new token, to print it where the person who started the server sees it."""
    _token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.has_token:
            self._renew()

    @property
    def is_open(self) -> bool:
        return self.password_hash is None and not self.has_token and self.sign_on is None

    def accepts(self, given: str) -> bool:
        """Whether this password or token lets in. A token does so once; then the next one is announced."""
        if self.has_token and secrets.compare_digest(given.encode(), self._token.encode()):
            self._renew()
            return True
        return self.password_hash is not None and is_password(given, self.password_hash)

    def _renew(self) -> None:
        self._token = secrets.token_urlsafe(24)
        self.announce(self._token)


def choose_policy(
    address: str,
    environ: Mapping[str, str] = os.environ,
    announce: Callable[[str], None] = print,
    make_sign_on: SignOnMaker | None = None,
) -> Policy:
    """The policy for a server on `address`: a password or a list of addresses that is set always counts; without, only loopback is open.

    Raises InputError for a weak password, a hash that is none or a list that is none: nothing is served with a lock that cannot close.
    """
    password, hashed = environ.get(PASSWORD_VARIABLE), environ.get(HASH_VARIABLE)
    if EMAILS_VARIABLE in environ:
        if password or hashed:
            raise InputError("access.two_ways", password=PASSWORD_VARIABLE, hash=HASH_VARIABLE, emails=EMAILS_VARIABLE)
        if make_sign_on is None:
            raise InputError("access.no_sign_on", reason="streamlit")
        return Policy(sign_on=make_sign_on(read_list(environ[EMAILS_VARIABLE]), environ.get(TRUST_VARIABLE) == "1"))
    if password and hashed:
        raise InputError("access.two_passwords", password=PASSWORD_VARIABLE, hash=HASH_VARIABLE)
    if password:
        return Policy(hash_password(password))
    if hashed:
        is_password("", hashed)
        return Policy(hashed)
    return Policy() if is_loopback(address) else Policy(has_token=True, announce=announce)


def is_loopback(address: str) -> bool:
    """127.0.0.0/8, ::1 or localhost. An empty address is every interface, so it is not."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
