"""Known vulnerabilities of locked packages: pip-audit asks a service that this test runs, or that is not there."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.environment.vulnerabilities import Audit, Finding, ask, main, read_answer, read_ignored, report
from core.errors import InputError, MachineError

HASH = f"--hash=sha256:{'ab' * 32}"
ANSWER = {
    "vulns": [
        {
            "id": "PYSEC-2099-1",
            "aliases": ["CVE-2099-1000", "GHSA-aaaa"],
            "summary": "reads what\nit should not",
            "affected": [
                {
                    "package": {"name": "alpha", "ecosystem": "PyPI"},
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}],
                }
            ],
        }
    ]
}


@contextmanager
def service(answers: dict[str, dict], status: int = 200) -> Iterator[tuple[str, list[dict]]]:
    """Answers as OSV does for these packages; everything else is fine. Yields its address and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(question)
            body = json.dumps(answers.get(question["package"]["name"], {})).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Not to the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "a.lock"
    file.write_text(f"alpha==1.0 {HASH}\nbeta==2.0 \\\n    {HASH}\n", encoding="utf-8")
    return file


def project(folder: Path, text: str = "") -> Path:
    file = folder / "pyproject.toml"
    file.write_text(text, encoding="utf-8")
    return file


def run(lock: Path, address: str, ignored: str = "") -> int:
    return main([str(lock), "--service", address, "--project", str(project(lock.parent, ignored))])


def test_a_known_vulnerability_fails_until_a_person_says_why_it_does_not_matter(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    with service({"alpha": ANSWER}) as (address, asked):
        assert run(lock, address) == 1
        said = capsys.readouterr()
        assert "alpha 1.0: CVE-2099-1000 (fixed in 2.0)\n    reads what it should not" in said.out
        assert "1 known vulnerabilities" in said.err
        assert [(q["package"]["name"], q["version"]) for q in asked] == [("alpha", "1.0"), ("beta", "2.0")]
        assert run(lock, address, '[tool.danlu.vulnerabilities]\n"GHSA-aaaa" = "we never read that"\n') == 0
    assert "Ignored: CVE-2099-1000 in alpha 1.0: we never read that" in capsys.readouterr().out


def test_a_service_that_is_not_there_is_said_in_one_line_and_fails_nothing(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    with service({}) as (address, _):
        pass
    assert run(lock, address) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "NOT checked" in said
    assert "ConnectionError" in said
    with service({}, status=403) as (address, _):
        assert run(lock, address) == 0
    assert "NOT checked" in capsys.readouterr().out


def test_nothing_found_says_how_much_was_checked(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    with service({}) as (address, asked):
        assert run(lock, address) == 0
    assert "none in 2 packages" in capsys.readouterr().out
    assert len(asked) == 2


def test_another_failure_of_pip_audit_is_no_network_failure(lock: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.executable", str(lock.with_name("python")))
    lock.with_name("python").write_text("#!/bin/sh\necho 'No module named pip_audit' >&2\nexit 1\n", encoding="utf-8")
    lock.with_name("python").chmod(0o755)
    with pytest.raises(MachineError) as caught:
        ask(lock)
    assert caught.value.params == {"code": 1, "reason": "No module named pip_audit"}


def test_a_reason_is_needed_to_ignore(tmp_path: Path):
    assert read_ignored(project(tmp_path)) == {}
    with pytest.raises(InputError) as caught:
        read_ignored(project(tmp_path, '[tool.danlu.vulnerabilities]\n"CVE-1" = " "\n'))
    assert caught.value.code == "dependencies.no_reason"


def test_what_was_not_checked_and_what_need_not_be_ignored_any_more_are_said():
    audit = read_answer(
        '{"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}]}'
    )
    assert audit == Audit(1, (), ("b",))
    said, counting = report(audit, {"CVE-1": "old"})
    assert counting == 0
    assert [(one.key.rpartition(".")[2], one.params) for one in said] == [
        ("unneeded", {"id": "CVE-1"}),
        ("skipped", {"names": "b"}),
        ("clean", {"count": 1}),
    ]


def test_a_finding_goes_by_the_name_that_people_look_for():
    def name_of(*ids: str) -> str:
        return Finding("a", "1", frozenset(ids), (), "").id

    assert name_of("PYSEC-1", "GHSA-1", "CVE-2") == "CVE-2"
    assert name_of("PYSEC-1", "GHSA-1") == "GHSA-1"
    assert name_of("PYSEC-1") == "PYSEC-1"
