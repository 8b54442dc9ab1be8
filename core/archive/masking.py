"""Takes secrets out of text on its way into an archive: values of this machine's environment, and what looks like a key of a hub."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

_NAME: Final = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_KEY|ACCESS_KEY|PRIVATE_KEY|_HASH)$")
_LEAST_CHARACTERS: Final = 8
_MASK: Final = b"***"
_KEYS: Final = re.compile(
    rb"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16})"
)
_PAIR: Final = re.compile(rb'("[A-Z][A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)"\s*:\s*")(?:[^"\\]|\\.)+(")')
"""An environment variable in JSON. Capitals only: `eos_token` is no secret."""
_ADDRESS: Final = re.compile(rb'("webhook"\s*:\s*")(?:[^"\\]|\\.)+(")')


def masker(environ: Mapping[str, str] = os.environ) -> Callable[[bytes], bytes]:
    """A function that masks whole lines of text."""
    known = sorted(_secrets(environ), key=len, reverse=True)

    def mask(line: bytes) -> bytes:
        for secret in known:
            line = line.replace(secret, _MASK)
        line = _PAIR.sub(rb"\1***\2", _KEYS.sub(_MASK, line))
        return _ADDRESS.sub(rb"\1\2", line)

    return mask


def _secrets(environ: Mapping[str, str]) -> Iterable[bytes]:
    for name, value in environ.items():
        if _NAME.search(name.upper()) and len(value) >= _LEAST_CHARACTERS:
            yield value.encode("utf-8", "surrogateescape")
            yield json.dumps(value, ensure_ascii=False).strip('"').encode("utf-8", "surrogateescape")
