"""A hub on loopback with the endpoints of Hugging Face and ModelScope, which cuts, lies and waits as it is told."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "a" * 40
REPO = "ada/tiny-chat"


@dataclass
class FakeHub:
    """What the server holds and how it misbehaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    cut_after_bytes: int | None = None
    """Each answer breaks off after so many bytes."""
    cuts_left: int = 10**9
    wrong_answers: int = 0
    """So many files still go out with a flipped byte."""
    knows_ranges: bool = True
    refuses: tuple[int, str] | None = None
    """Status and X-Error-Code of every API answer."""
    errors_left: int = 0
    """So many downloads are answered with 503."""
    hold_after_bytes: int | None = None
    """An answer longer than this stops there until `go` is set."""
    go: threading.Event = field(default_factory=threading.Event)
    has_hashes: bool = True
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path, headers (lower case)."""
    sent_bytes: int = 0

    def downloads(self) -> list[tuple[str, str | None]]:
        """File name and Range header of each request for bytes, without the redirects."""
        return [
            (unquote(path.split("FilePath=")[-1].split("/cdn/")[-1].split(f"{COMMIT}/")[-1]), headers.get("range"))
            for _, path, headers in self.requests
            if "/cdn/" in path or "FilePath=" in path or ("/resolve/" in path and not path.endswith(".safetensors"))
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if parts.path.startswith("/api/"):
            self._answer_api(parts.path, query)
        elif found := re.fullmatch(rf"/{REPO}/resolve/{COMMIT}/(.+)", parts.path):
            name = unquote(found[1])
            if name.endswith(".safetensors"):  # The weights lie on another host, as with git-lfs.
                self._redirect(f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{found[1]}")
            else:
                self._serve(name)
        elif parts.path.startswith("/cdn/"):
            self._serve(unquote(parts.path.removeprefix("/cdn/")))
        else:
            self._json({"error": "not found"}, 404)

    def _answer_api(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.hub
        if hub.refuses:
            self._json({"error": "no", "Message": "no"}, hub.refuses[0], {"X-Error-Code": hub.refuses[1]})
        elif path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/{COMMIT}"):
            siblings = [_sibling(name, data, hub.has_hashes) for name, data in hub.files.items()]
            self._json({"id": REPO, "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/ada/tiny-chat/revision/"):
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/v1/models/{REPO}/repo/files":
            files = [_entry(name, data, hub.has_hashes) for name, data in hub.files.items()]
            tree = {"Type": "tree", "Path": "assets", "Name": "assets", "Size": 0}
            self._json({"Code": 200, "Success": True, "Data": {"Files": [tree, *files]}})
        elif path == f"/api/v1/models/{REPO}/repo":
            self._serve(query["FilePath"][0])
        else:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _redirect(self, place: str) -> None:
        self.send_response(302)
        self.send_header("Location", place)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)

    def _serve(self, name: str) -> None:
        hub, data = self.hub, self.hub.files[name]
        if hub.errors_left:
            hub.errors_left -= 1
            self._json({"error": "busy"}, 503)
            return
        if hub.wrong_answers:
            hub.wrong_answers -= 1
            data = bytes([data[0] ^ 255]) + data[1:]
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and hub.knows_ranges:
            start = int(asked[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self._send(data[start:])

    def _send(self, body: bytes) -> None:
        hub = self.hub
        limit = hub.cut_after_bytes
        is_cut = limit is not None and hub.cuts_left > 0 and len(body) > limit
        if is_cut:
            hub.cuts_left -= 1
            body = body[:limit]
        first = len(body) if hub.hold_after_bytes is None else hub.hold_after_bytes
        try:
            for part in (body[:first], body[first:]):
                self.wfile.write(part)
                hub.sent_bytes += len(part)
                if len(body) > first:
                    hub.go.wait()
        except OSError:
            self.close_connection = True  # The other side has gone.
            return
        if is_cut:
            self.close_connection = True


def _sibling(name: str, data: bytes, has_hashes: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"rfilename": name, "size": len(data)}
    if has_hashes:
        value["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if has_hashes and name.endswith((".safetensors", ".bin")):
        value["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return value


def _entry(name: str, data: bytes, has_hashes: bool) -> dict[str, Any]:
    value = {"Type": "blob", "Path": name, "Name": name.rsplit("/", maxsplit=1)[-1], "Size": len(data)}
    return {**value, "Sha256": hashlib.sha256(data).hexdigest()} if has_hashes else value


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub(dict(files))
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


def model_files(folder: Path) -> dict[str, bytes]:
    """What a model folder holds, by name, and the clutter that hubs have beside it."""
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }
    clutter = {
        ".gitattributes": b"x",
        "model.gguf": b"G" * 999,
        "onnx/model.onnx": b"O" * 999,
        "pytorch_model.bin": b"B" * 99,
    }
    return {**files, **clutter, "assets/notes.md": b"# notes"}


def reach_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no token, no mirror, and a library that asks although another test of this process told it to be offline."""
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset_sessions()
