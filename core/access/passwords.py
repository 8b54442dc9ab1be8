"""Passwords as salted scrypt hashes: `python -m core.access.passwords` asks for one and prints the line to set. Knows no request.

scrypt (RFC 7914) from the standard library's OpenSSL, with n=2^14, r=8, p=5: the parameters OWASP lists for 16 MiB of memory.
"""

import getpass
import hashlib
import hmac
import os
import sys
from base64 import b64decode, b64encode
from typing import Final

from core.errors import InputError
from core.i18n import catalog, guess_language

LEAST_LENGTH: Final = 10
_COST: Final = (2**14, 8, 5)
_MEMORY_BYTES: Final = 64 * 2**20


def hash_password(password: str) -> str:
    """`scrypt$n$r$p$salt$hash`. Raises InputError `access.weak_password` if it is shorter than 10 characters."""
    if len(password) < LEAST_LENGTH:
        raise InputError("access.weak_password", least=LEAST_LENGTH)
    salt = os.urandom(16)
    digest = _scrypt(password, salt, *_COST)
    return "$".join(("scrypt", *map(str, _COST), b64encode(salt).decode(), b64encode(digest).decode()))


def is_password(given: str, hashed: str) -> bool:
    """Whether `given` is the password behind `hashed`. Raises InputError `access.bad_hash` if that is no line of `hash_password`."""
    try:
        kind, n, r, p, salt, digest = hashed.split("$")
        cost = int(n), int(r), int(p)
        expected, salt_bytes = b64decode(digest, validate=True), b64decode(salt, validate=True)
        if kind != "scrypt":
            raise ValueError(kind)
        found = _scrypt(given, salt_bytes, *cost)
    except ValueError as error:
        raise InputError("access.bad_hash", reason=str(error)) from error
    return hmac.compare_digest(found, expected)


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=_MEMORY_BYTES, dklen=32)


def main() -> int:
    words = catalog(guess_language(os.environ.get("LANG")))
    first = getpass.getpass(words.text("access.password") + ": ")
    if first != getpass.getpass(words.text("access.again") + ": "):
        print(words.text("access.differ"), file=sys.stderr)
        return 1
    try:
        print(f"export DANLU_PASSWORD_HASH='{hash_password(first)}'")
    except InputError as error:
        print("\n".join(words.explain(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
