"""Brings one file over HTTP: goes on where it was cut off, and believes it only if size and hash are right. Knows no hub.

The hubs' own loops lose up to 10 MiB at each cut and check the size alone, so the bytes are fetched here.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from core.errors import InputError, MachineError

PART: Final = ".part"
"""Suffix of a file that is not whole yet."""
_CHUNK_BYTES: Final = 256 * 2**10
_READ_BYTES: Final = 8 * 2**20
_TIMEOUT_SECONDS: Final = (15.0, 60.0)
"""To connect; between two chunks."""
_ATTEMPTS: Final = 6
"""Tries in a row that bring no new byte before a transfer is given up."""
_WAIT_SECONDS: Final = 1.0
"""After the first of them; twice as long after each further one."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a hub, as its listing describes it."""

    path: str
    """Relative to the model folder, with slashes."""
    size_bytes: int
    digest: str | None
    """`sha256:<hex>`, or `git:<hex>` (SHA-1 of a git blob), or None where the hub states none."""


@dataclass(frozen=True, slots=True)
class Link:
    """Where a file is fetched from."""

    url: str
    headers: Mapping[str, str]


def fetch(
    remote: RemoteFile,
    link: Link,
    target: Path,
    *,
    on_bytes: Callable[[int], None],
    on_verify: Callable[[], None],
) -> None:
    """Bring `remote` to `target`, which appears only when it is whole and its hash is right.

    `on_bytes` gets the position in the file after each chunk and may raise to stop; what has come stays in `<target>.part` for
    the next call. Raises MachineError if the connection stays down, the disk is full or the hash is wrong twice, InputError if
    the file is refused or gone.
    """
    part = target.with_name(target.name + PART)
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            _complete(part, remote, link, on_bytes)
        except OSError as error:
            raise MachineError("models.cannot_store", path=str(part), reason=error.strerror or str(error)) from error
        on_verify()
        if is_right(part, remote):
            part.replace(target)
            return
        part.unlink(missing_ok=True)
    raise MachineError("models.wrong_bytes", file=remote.path, url=link.url)


def is_right(file: Path, remote: RemoteFile) -> bool:
    """Whether `file` has the size and, where the hub states one, the hash of `remote`."""
    if not file.is_file() or file.stat().st_size != remote.size_bytes:
        return False
    kind, _, wanted = (remote.digest or "").partition(":")
    if not wanted:
        return True
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {remote.size_bytes}\0".encode())
    with open(file, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest() == wanted.lower()


def have_bytes(target: Path) -> int:
    """Bytes of `target` that lie on the disk, whole or in part."""
    part = target.with_name(target.name + PART)
    return next((file.stat().st_size for file in (target, part) if file.is_file()), 0)


def _complete(part: Path, remote: RemoteFile, link: Link, on_bytes: Callable[[int], None]) -> None:
    """Fetch what `part` lacks, over as many connections as it takes."""
    from requests import RequestException

    part.touch()
    if part.stat().st_size > remote.size_bytes:
        part.unlink()
        part.touch()
    failures = 0
    while (before := part.stat().st_size) < remote.size_bytes:
        reason = "-"
        try:
            _append(part, remote, link, on_bytes)
        except RequestException as error:
            reason = str(error)[:200]
        if part.stat().st_size > before:
            failures = 0
            continue
        failures += 1
        if failures >= _ATTEMPTS:
            raise MachineError("models.connection_lost", file=remote.path, url=link.url, reason=reason)
        on_bytes(part.stat().st_size)
        time.sleep(_WAIT_SECONDS * 2 ** (failures - 1))
    on_bytes(remote.size_bytes)


def _append(part: Path, remote: RemoteFile, link: Link, on_bytes: Callable[[int], None]) -> None:
    """One request: the rest of the file, or the whole of it if the server knows no ranges."""
    import requests

    have = part.stat().st_size
    headers = {**link.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(link.url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as response:
        require_served(response, remote.path)
        is_continued = response.status_code == 206 and _starts_at(response, have)
        with open(part, "ab" if is_continued else "wb") as stream:
            _write(stream, response, remote.size_bytes, on_bytes)


def _write(stream: IO[bytes], response: Any, size_bytes: int, on_bytes: Callable[[int], None]) -> None:
    try:
        for chunk in response.iter_content(_CHUNK_BYTES):
            stream.write(chunk)
            on_bytes(stream.tell())
            if stream.tell() > size_bytes:
                return  # More than was announced: the hash will not fit, and the disk is not for the server to fill.
    finally:
        stream.flush()
        os.fsync(stream.fileno())


def require_served(response: Any, name: str) -> None:
    """Raises InputError for an answer that will not change by trying again; requests.HTTPError for one that may."""
    if response.status_code in (401, 403):
        raise InputError("models.hub_gated", name=name)
    if response.status_code in (404, 410):
        raise InputError("models.hub_not_found", name=name)
    response.raise_for_status()


def _starts_at(response: Any, position: int) -> bool:
    """Whether a 206 answer really begins where it was asked to."""
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {position}-")
