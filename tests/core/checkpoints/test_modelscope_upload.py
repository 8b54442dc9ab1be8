"""Pushing to ModelScope: without its library the way to it is told; with it, to a server on this machine that speaks its protocol."""

import base64
import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from core.checkpoints.modelscope_upload import PACKAGE, has_token, is_installed, upload_to_modelscope
from core.errors import InputError, MachineError
from core.runs.job import SilentProgress
from tests.core.checkpoints.crafted import write_adapter
from tests.models import write_tiny_llama

TOKEN = "ms-a-secret-that-must-not-be-seen"
with_library = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="modelscope-hub is not required"
)


class Hub(ThreadingHTTPServer):
    """What the server got."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        hub, body = self.server, json.loads(self.body())
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            self.answer({"Code": hub.refuses, "Message": f"not with {TOKEN}"}, hub.refuses)
        elif self.path == "/api/v1/models":
            is_new = not hub.made
            hub.made.append(body)
            answers = {True: ({"Data": body}, 200), False: ({"Code": 10010, "Message": "already exists"}, 400)}
            self.answer(*answers[is_new])
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": item["oid"], "actions": {"upload": {"href": f"{hub.address}/put/{item['oid']}"}}}
                for item in body["objects"]
            ]
            self.answer({"Data": {"objects": objects}})
        elif self.path == "/api/v1/repos/models/ada/tiny/commit/master":
            for action in body["actions"]:
                is_large = action["type"] == "lfs"
                content = hub.blobs[action["sha256"]] if is_large else base64.b64decode(action["content"])
                hub.files[action["path"]] = content
            self.answer({"Success": True, "Data": {"commit": "abc"}})
        else:
            self.answer({"Message": self.path}, 404)

    def do_PUT(self) -> None:
        content = self.body()
        self.server.blobs[self.path.rpartition("/")[2]] = content
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.answer({"Code": 200})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "tiny", write_tiny_llama(tmp_path / "base"))
    (folder / "danlu.json").write_text("{}")
    (folder / ".hidden").write_text("no")
    (folder / "README.md").write_text("# tiny\n")
    return folder


def push(folder: Path, repository: str = "ada/tiny", **options: Any) -> dict[str, Any]:
    return upload_to_modelscope(str(folder), repository, progress=SilentProgress(), **options)


def test_without_the_library_it_is_said_what_to_install(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not is_installed()
    with pytest.raises(MachineError) as caught:
        push(adapter)
    assert (caught.value.code, caught.value.params) == ("checkpoints.no_modelscope", {"package": PACKAGE})
    with pytest.raises(InputError) as refused:
        push(adapter, "no name")
    assert refused.value.code == "checkpoints.bad_repository"


def test_a_token_is_found_where_the_library_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    assert not has_token()
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/git_token").write_text(TOKEN)
    assert has_token()
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    assert has_token()


@with_library
def test_everything_but_the_machine_s_own_arrives_in_a_private_repository(adapter: Path, hub: Hub) -> None:
    for _ in range(2):  # the second time the repository is there
        made = push(adapter, base_model="internlm/internlm2-chat-7b")
    assert made["url"] == f"{hub.address}/models/ada/tiny"
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    config = json.loads(hub.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "internlm/internlm2-chat-7b"
    assert {(body["Path"], body["Name"], body["Visibility"]) for body in hub.made[:1]} == {("ada", "tiny", 1)}
    assert hub.tokens == {f"Bearer {TOKEN}"}


@with_library
def test_refusal_and_missing_token_are_explained_without_the_token(
    adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, code in ((401, "upload_refused"), (403, "upload_refused"), (400, "upload_failed")):
        hub.refuses = status
        with pytest.raises((InputError, MachineError)) as caught:
            push(adapter)
        assert caught.value.code == f"checkpoints.{code}"
        assert TOKEN not in str(caught.value.params)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    with pytest.raises(InputError) as missing:
        push(adapter)
    assert missing.value.code == "checkpoints.no_modelscope_token"
