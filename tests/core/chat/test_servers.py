"""Another program's server: found if installed, started with its own command line, talked to, and ended."""

import json
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.chat.client import Endpoint, Reply, list_models, stream_chat
from core.chat.servers import find_servers, installed_engines, start_server
from core.errors import InputError, JobError, MachineError
from core.models.remote_code import allow
from core.project import Project, open_project
from core.runs.control import request_stop
from core.runs.state import read_status

STAND_IN = """
import argparse, json, os
from http.server import BaseHTTPRequestHandler, HTTPServer
parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--port"):
    parser.add_argument(name, required=True)
parser.add_argument("--trust-remote-code", action="store_true")
given = parser.parse_args()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        is_known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if is_known else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": given.served_model_name}, {"id": str(given.trust_remote_code)}]}).encode())
HTTPServer((given.host, int(given.port)), Handler).serve_forever()
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    opened = open_project(tmp_path / "project")
    model = opened.final_model / "tuned {x}"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return opened


def test_what_is_not_installed_is_not_started(project: Project) -> None:
    assert "vllm" not in installed_engines()
    with pytest.raises(MachineError, match="no_engine"):
        start_server(project, "vllm", project.final_model / "tuned {x}", "tuned")
    with pytest.raises(InputError, match="no_model"):
        start_server(project, "vllm", project.final_model, "tuned")


def test_an_installed_one_serves_the_model(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert "vllm" in installed_engines()
    folder = project.final_model / "tuned {x}"
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "own.Model"}}')
    (folder / "own.py").write_text("")
    with pytest.raises(InputError, match="code_not_allowed"):
        start_server(project, "vllm", folder, "my model")
    allow(project, folder)
    run, endpoint = start_server(project, "vllm", folder, "my model")
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                assert list_models(endpoint) == ["my model", "True"]
                break
            except JobError:
                assert time.monotonic() < deadline, run.log_file.read_text()
                time.sleep(0.1)
        with pytest.raises(JobError, match="refused"):
            list_models(Endpoint(endpoint.url, "guessed"), 240.0)
        assert stat.S_IMODE((run.path / "api_key").stat().st_mode) == 0o600
        assert endpoint.key not in run.spec_file.read_text()
        assert [server.endpoint for server in find_servers(project)] == [endpoint]
    finally:
        request_stop(run, "cancel")
        deadline = time.monotonic() + 240
        while read_status(run).phase.is_active and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not read_status(run).phase.is_active
    assert find_servers(project) == []


def test_a_server_that_falls_silent_can_be_left() -> None:
    """It speaks HTTP/1.0, where the end of the connection is the end of the answer, and does not end it."""
    go = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n')
            go.wait()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server, ThreadPoolExecutor(1) as pool:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reply = Reply()
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}")
        stream = stream_chat(endpoint, [{"role": "user", "content": "hi"}], {}, reply)
        assert next(stream) == "one"
        rest = pool.submit(list, stream)
        reply.cancel()
        assert rest.result(240) == []
        go.set()
        server.shutdown()
    assert (reply.text, reply.reason) == ("one", "cancelled")


@pytest.mark.parametrize(("source", "is_told"), [("ArgumentHelper.trust_remote_code(parser)", True), ("", False)])
def test_an_lmdeploy_that_knows_no_trust_is_not_told_to_trust(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_told: bool
) -> None:
    package = tmp_path / "site" / "lmdeploy"
    (package / "cli").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli" / "serve.py").write_text(source)
    (package / "__main__.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    folder = project.final_model / "tuned {x}"
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "own.Model"}}')
    run, endpoint = start_server(project, "lmdeploy", folder, "mine")
    deadline = time.monotonic() + 240
    while read_status(run).phase.is_active:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [said] = [json.loads(line) for line in run.log_file.read_text().splitlines() if line.startswith("[")]
    assert said[:5] == ["serve", "api_server", str(folder), "--model-name", "mine"]
    assert said[-2:] == ["--api-keys", endpoint.key]
    assert ("--trust-remote-code" in said) == is_told
