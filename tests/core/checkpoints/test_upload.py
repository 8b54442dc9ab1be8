"""Pushing to a server on this machine that speaks the hub's protocol as far as an upload needs it."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from core.checkpoints.upload import check_repository
from core.errors import InputError
from tests.core.checkpoints.crafted import write_adapter
from tests.models import write_tiny_llama

TOKEN = "hf_a_secret_that_must_not_be_seen"


@dataclass
class Hub:
    """What the server got."""

    address: str = ""
    refuses: int = 0
    """Status to answer the making of a repository with; 0: let it."""
    repositories: list[dict[str, Any]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def files(self) -> dict[str, bytes]:
        """The content of the last commit."""
        found = {}
        for line in self.commits[-1]:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.large[value["oid"]]
        return found

    def post(self, path: str, body: bytes) -> tuple[Any, int]:
        """Answer and status."""
        if path == "/api/repos/create" and self.refuses:
            return {"error": f"not with Bearer {TOKEN}"}, self.refuses
        if path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            return {"url": f"{self.address}/ada/tiny"}, 200
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}, 200
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.address}/put/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return {"transfer": "basic", "objects": objects}, 200
        if "/commit/" in path:
            self.commits.append([json.loads(line) for line in body.splitlines()])
            address = f"{self.address}/ada/tiny/commit/abc"
            return {"commitUrl": address, "commitOid": "abc", "hookOutput": "", "success": True}, 200
        known = {"/api/validate-yaml": {"errors": [], "warnings": []}}
        return known.get(path, {"error": path}), 200 if path in known else 404


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            self.answer(*hub.post(self.path, self.body()))

        def do_PUT(self) -> None:
            body = self.body()
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            self.answer({})

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "tiny", write_tiny_llama(tmp_path / "base"))
    (folder / "danlu.json").write_text(json.dumps({"base_model": {"path": str(tmp_path / "base")}}))
    (folder / "README.md").write_text("# tiny\n")
    (folder / ".hidden").write_text("no")
    return folder


def push(
    folder: Path, hub: Hub, repository: str = "ada/tiny", token: str = TOKEN, **options: Any
) -> tuple[int, dict[str, Any], str]:
    """Exit code, result or error, and everything the job wrote: run as a job runs, with the environment deciding."""
    run = folder.parent / f"run_{len(list(folder.parent.glob('run_*')))}"
    run.mkdir()
    arguments = {"folder": str(folder), "repository": repository, **options}
    details = {"function": "core.checkpoints.upload:upload", "arguments": arguments}
    spec = {
        "schema_version": 1,
        "id": run.name,
        "kind": "upload",
        "title": "t",
        "argv": [],
        "cwd": "/",
        "env": {},
        "gpus": [],
        "created_at": "",
        "details": details,
    }
    (run / "run.json").write_text(json.dumps(spec))
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(folder.parent / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "core.runs.job", str(run)],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    written = done.stdout + done.stderr + "".join(file.read_text() for file in run.iterdir())
    outcome = run / ("result.json" if done.returncode == 0 else "error.json")
    assert outcome.exists(), done.stderr
    return done.returncode, json.loads(outcome.read_text()), written


def test_everything_but_the_machine_s_own_arrives_in_one_commit(adapter: Path, hub: Hub) -> None:
    code, result, written = push(adapter, hub, base_model="ada/base")
    assert code == 0, written
    assert (result["commit"], result["files"], len(hub.commits)) == ("abc", 3, 1)
    assert (hub.repositories[0]["name"], hub.repositories[0]["private"]) == ("tiny", True)
    found = hub.files()
    assert found.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert found["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "ada/base"
    assert str(adapter.parent) not in b"".join(found.values()).decode("latin1")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in written


def test_refusal_missing_token_and_lost_server_are_explained_without_the_token(adapter: Path, hub: Hub) -> None:
    hub.refuses = 403
    code, error, written = push(adapter, hub)
    assert (code, error["code"]) == (3, "checkpoints.upload_refused")
    assert TOKEN not in written
    hub.refuses = 500
    code, error, written = push(adapter, hub)
    assert (code, error["code"]) == (3, "checkpoints.upload_failed")
    assert TOKEN not in written
    code, error, _ = push(adapter, hub, token="")
    assert (code, error["code"]) == (3, "checkpoints.no_token")
    hub.address = "http://127.0.0.1:9"
    code, error, written = push(adapter, hub)
    assert (code, error["code"]) == (3, "checkpoints.upload_failed")
    assert TOKEN not in written
    assert not hub.commits


@pytest.mark.parametrize(
    "name", ["tiny", "ada/tiny/more", "ada/", "/tiny", "a b/c", "../x", "ada/ti--ny", "ada/..", ""]
)
def test_names_that_are_no_repository(name: str) -> None:
    with pytest.raises(InputError) as caught:
        check_repository(name)
    assert caught.value.code == "checkpoints.bad_repository"
    assert check_repository(" ada/tiny-1.5 ") == "ada/tiny-1.5"
