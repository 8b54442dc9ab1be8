"""Who gets in: everyone on loopback, else whoever has the password or the token printed at start. Decides; serves nothing."""

import ipaddress
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.access.passwords import hash_password, is_password
from core.errors import InputError

PASSWORD_VARIABLE = "DANLU_PASSWORD"  # noqa: S105 - the name of a variable
HASH_VARIABLE = "DANLU_PASSWORD_HASH"


@dataclass(slots=True)
class Policy:
    """What a login must show. Without a password and without a token nobody has to log in."""

    password_hash: str | None = None
    has_token: bool = False
    announce: Callable[[str], None] = print
    """Told each new token, to print it where the person who started the server sees it."""
    _token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.has_token:
            self._renew()

    @property
    def is_open(self) -> bool:
        return self.password_hash is None and not self.has_token

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
    address: str, environ: Mapping[str, str] = os.environ, announce: Callable[[str], None] = print
) -> Policy:
    """The policy for a server on `address`: a password that is set is always asked for; without one, only loopback is open.

    Raises InputError for a weak password or a hash that is none: nothing is served with a lock that cannot close.
    """
    password, hashed = environ.get(PASSWORD_VARIABLE), environ.get(HASH_VARIABLE)
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
