"""Another program's server: found if installed, started with its own command line, talked to, and ended."""

import time
from pathlib import Path

import pytest

from core.chat.client import Endpoint, list_models
from core.chat.servers import installed_engines, start_server
from core.errors import InputError, JobError, MachineError
from core.project import Project, open_project
from core.runs.control import request_stop
from core.runs.state import read_status

STAND_IN = """
import argparse, json
from http.server import BaseHTTPRequestHandler, HTTPServer
parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--port"):
    parser.add_argument(name, required=True)
given = parser.parse_args()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": given.served_model_name}]}).encode())
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
    run, url = start_server(project, "vllm", project.final_model / "tuned {x}", "my model")
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                assert list_models(Endpoint(url)) == ["my model"]
                break
            except JobError:
                assert time.monotonic() < deadline, run.log_file.read_text()
                time.sleep(0.1)
    finally:
        request_stop(run, "cancel")
        deadline = time.monotonic() + 20
        while read_status(run).phase.is_active and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not read_status(run).phase.is_active
