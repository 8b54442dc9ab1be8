"""The watch in the supervisor: stops a broken run, tells a webhook, survives a full disk; and a run that goes on in its folder."""

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConflictError, InputError, MachineError
from core.files import write_json
from core.project import Project
from core.runs import processes
from core.runs.again import go_on, resume_point, retry
from core.runs.control import request_stop
from core.runs.directory import RunDirectory, RunSpec
from core.runs.failure import explain_failure
from core.runs.launch import now_utc
from core.runs.metrics import MetricsReader
from core.runs.state import Phase, read_attempt, read_status
from core.runs.watch import Watch, WatchRules, read_alerts, read_rules
from core.runs.webhook import body_for, check, post
from tests.core.runs.conftest import Start, log_of, save_checkpoint, wait_for, wait_for_step, wait_until


@dataclass
class Receiver:
    """A webhook's other end. `/no` refuses, `/slow` answers once `go` is set."""

    url: str = ""
    got: list[dict[str, Any]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if self.path == "/slow":
                made.go.wait()
            self.send_response(500 if self.path == "/no" else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    made.go.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_nan_ends_the_run_and_keeps_the_last_good_checkpoint(start: Start) -> None:
    run = start("--steps", "100000", "--nan-from", "30")
    status = wait_for(run, Phase.CANCELLED)
    assert (status.stop_reason, status.stop_mode) == ("nan", "cancel")
    assert list(run.path.glob("iter_*")) == [], "nothing was saved on the way out"
    (alert,) = [alert for alert in read_alerts(run)[0] if alert.kind == "nan"]
    assert (alert.level, alert.params["first"]) == ("error", 30)
    assert alert.until is not None
    metrics = MetricsReader(run.metrics_file).refresh()
    assert math.isnan(metrics["loss"][29])


def test_nan_does_not_end_a_run_whose_person_said_no(start: Start, project: Project) -> None:
    run = start("--steps", "100000", "--nan-from", "1", rules=WatchRules(stop_on=()))

    def nan_steps() -> int:
        errors = [alert for alert in read_alerts(run)[0] if (alert.kind, alert.level) == ("nan", "error")]
        return errors[-1].params["count"] if errors else 0

    wait_until(lambda: nan_steps() > 0)
    seen = nan_steps()
    wait_until(lambda: nan_steps() > seen)  # the watch has looked once more, after it had an error to act on
    assert read_status(run).phase is Phase.RUNNING


def test_webhook_gets_alert_and_end(start: Start, receiver: Receiver) -> None:
    got = receiver.got
    run = start("--steps", "100000", "--nan-from", "60", rules=WatchRules(webhook=receiver.url, language="zh"))
    wait_for(run, Phase.CANCELLED)
    wait_until(lambda: {event["event"] for event in got} == {"alert", "end"})
    assert ("alert", "nan") in [(event["event"], event["kind"]) for event in got]
    (end,) = [event for event in got if event["event"] == "end"]
    assert (end["kind"], end["text"]) == ("cancelled", f"{run.id}: 已取消")
    wait_until(lambda: read_alerts(run)[1].get("sent") == len(got))


def test_a_webhook_that_refuses_is_noted_and_harms_nothing(tmp_path: Path, receiver: Receiver) -> None:
    run = RunDirectory(tmp_path)
    write_json(run.watch_file, {"webhook": f"{receiver.url}/no", "stop_on": []})
    watch = Watch(run, spec(), None)
    watch.close("finished")
    delivery = read_alerts(run)[1]
    assert (delivery["sent"], delivery["failed"]) == (0, 1)
    assert "500" in delivery["reason"]


def test_a_webhook_that_dawdles_keeps_nobody_from_the_device_or_from_going_on(start: Start, receiver: Receiver) -> None:
    run = start("--steps", "1", "--exit-code", "1", rules=WatchRules(webhook=f"{receiver.url}/slow"))
    wait_for(run, Phase.FAILED)
    wait_until(lambda: bool(receiver.got))
    assert read_status(start("--steps", "1")).phase is not Phase.QUEUED, "its device is free"
    save_checkpoint(run, 1)

    def waits() -> bool:
        """Whether two processes have the lock's file open: the supervisor that waits for the answer, and the next one."""
        lock, found = str(run.supervisor_lock), 0
        for stat in processes.all_processes():
            with suppress(OSError):
                found += any(str(handle.readlink()) == lock for handle in Path(f"/proc/{stat.pid}/fd").iterdir())
        return found == 2

    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(go_on, run)
        wait_until(lambda: waits() or going.done())
        receiver.go.set()
        assert going.result().iteration == 1
    wait_for(run, Phase.FAILED)
    assert read_attempt(run)["number"] == 2


def test_webhook_addresses_and_formats() -> None:
    for url in ("file:///etc/passwd", "ftp://x/y", "https://", "example.com", "http://a b/", "http://[::1"):
        with pytest.raises(InputError):
            check(url)
    with pytest.raises(MachineError):
        post("http://127.0.0.1:9/", {"text": "x"})
    event = {"text": "hello", "kind": "nan"}
    assert body_for("https://example.com/x", event) == event
    assert body_for("https://open.feishu.cn/open-apis/bot/v2/hook/1", event)["content"] == {"text": "hello"}
    assert body_for("https://oapi.dingtalk.com/robot/send?access_token=1", event)["text"] == {"content": "hello"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stop_on": ["unknown", "nan"], "webhook": null}'])
def test_broken_rules_are_the_defaults(tmp_path: Path, content: str) -> None:
    file = tmp_path / "watch.json"
    assert read_rules(file) == WatchRules()
    file.write_text(content, encoding="utf-8")
    assert read_rules(file).webhook == ""
    assert "nan" in read_rules(file).stop_on


def spec(**changes: Any) -> RunSpec:
    return RunSpec(id="r", kind="train", title="t", argv=["/x"], cwd="/", created_at=now_utc(), **changes)


def write_lines(run: RunDirectory, losses: list[float]) -> None:
    with open(run.metrics_file, "a", encoding="utf-8") as stream:
        for number, loss in enumerate(losses, 1):
            stream.write(json.dumps({"iteration": number, "loss": loss}) + "\n")


def test_a_full_disk_loses_no_alert_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    watch = Watch(run, spec(), None)
    is_full = True

    def replace(path: Path, content: bytes) -> None:
        if is_full:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr("core.runs.watch.replace_file", replace)
    monkeypatch.setattr("core.runs.watch.LOOK_SECONDS", 0.0)
    write_lines(run, [math.nan] * 2)
    watch.look()
    assert not run.alerts_file.exists()
    is_full = False
    watch.look()
    assert [alert.kind for alert in read_alerts(run)[0]] == ["nan"]


def test_half_lines_and_a_replaced_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.runs.watch.LOOK_SECONDS", 0.0)
    run = RunDirectory(tmp_path)
    watch = Watch(run, spec(), None)
    run.metrics_file.write_text('{"iteration": 1, "loss": N', encoding="utf-8")
    watch.look()
    assert read_alerts(run)[0] == []
    with open(run.metrics_file, "a", encoding="utf-8") as stream:
        stream.write("aN}\ngarbage\n[]\n")
    watch.look()
    assert [alert.kind for alert in read_alerts(run)[0]] == ["nan"]
    run.metrics_file.write_text("", encoding="utf-8")
    watch.look()
    run.metrics_file.unlink()
    watch.look()


def test_rules_that_change_within_one_tick_of_the_clock_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.runs.watch.LOOK_SECONDS", 0.0)
    run = RunDirectory(tmp_path)
    watch = Watch(run, spec(), None)
    for webhook in ("http://a", "http://b", "http://long"):
        write_json(run.watch_file, {"webhook": webhook})
        os.utime(run.watch_file, ns=(10**18, 10**18))
        watch.look()
        assert watch._rules.webhook == webhook
    run.watch_file.unlink()
    watch.look()
    assert watch._rules == WatchRules()


def test_a_new_watch_closes_what_an_old_one_left_open(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    alert = {"kind": "spike", "level": "warning", "subject": "", "since": 1.0, "iteration": 5, "params": {}}
    write_json(run.alerts_file, {"alerts": [alert]})
    write_lines(run, [math.nan] * 5)  # of the attempt before: no news
    watch = Watch(run, spec(), None)
    watch.look()
    alerts = read_alerts(run)[0]
    assert [each.kind for each in alerts] == ["spike"]
    assert alerts[0].until is not None


def test_pause_and_go_on_at_the_same_step(start: Start) -> None:
    run = start("--steps", "60", "--hold-at", "5")
    wait_until(lambda: len(MetricsReader(run.metrics_file).refresh()) == 5)
    request_stop(run, "save")
    wait_for(run, Phase.STOPPED)
    saved = save_checkpoint(run, 5)
    card = go_on(run)
    assert (card.path, read_attempt(run)["number"]) == (saved, 2)
    assert wait_for(run, Phase.FINISHED).stop_mode is None
    metrics = MetricsReader(run.metrics_file).refresh()
    assert metrics["iteration"].tolist() == list(range(1, 61))
    assert log_of(run).count("step ") == 60
    with pytest.raises(ConflictError, match="complete"):
        go_on(run)


def test_going_on_needs_a_checkpoint_and_a_run_that_has_ended(start: Start) -> None:
    run = start("--steps", "100000")
    with pytest.raises(ConflictError, match="still_running"):
        go_on(run)
    request_stop(run, "cancel")
    wait_for(run, Phase.CANCELLED)
    with pytest.raises(InputError, match="no_checkpoint"):
        go_on(run)


def test_a_checkpoint_saved_while_the_loss_was_nan_is_not_gone_on_from(start: Start) -> None:
    run = start("--steps", "1")
    wait_for(run, Phase.FINISHED)
    good, spoilt = save_checkpoint(run, 100), save_checkpoint(run, 200)
    os.utime(good, (1000, 1000))
    os.utime(spoilt, (1010, 1010))
    alert = {"kind": "nan", "level": "error", "subject": "", "since": 1005.0, "until": 1015.0}
    write_json(run.alerts_file, {"alerts": [alert | {"iteration": 150, "params": {"first": 150, "count": 9}}]})
    card = resume_point(run)
    assert card is not None
    assert card.path == good


def test_retry_is_the_same_run_in_a_new_folder(start: Start, project: Project) -> None:
    run = start("--steps", "2", "--exit-code", "1")
    wait_for(run, Phase.FAILED)
    with pytest.raises(InputError, match="missing"):
        retry(project, run)
    run.source.mkdir()
    (run.source / "tiny.py").write_text("x = 1\n", encoding="utf-8")
    again = retry(project, run)
    wait_for(again, Phase.FAILED)
    assert again.path != run.path
    assert (again.source / "tiny.py").read_text() == "x = 1\n"
    assert again.spec().details["retry_of"] == run.id
    assert len(again.metrics_file.read_text().splitlines()) == 2
    assert len(run.metrics_file.read_text().splitlines()) == 2


def test_only_the_last_attempt_explains_a_failure(start: Start) -> None:
    run = start("--steps", "1", "--exit-code", "1", "--print", "CUDA out of memory")
    wait_for(run, Phase.FAILED)
    failure = explain_failure(run)
    assert failure is not None
    assert failure.cause == "cuda_oom"
    save_checkpoint(run, 1)
    go_on(run)
    wait_for(run, Phase.FAILED)
    offset = read_attempt(run)["log_offset"]
    with open(run.log_file, "r+", encoding="utf-8") as stream:
        stream.truncate(offset)
        stream.seek(0, 2)
        stream.write("OSError: [Errno 28] No space left on device\n")
    failure = explain_failure(run)
    assert failure is not None
    assert failure.cause == "disk_full"


def test_a_rank_that_dies_alone_ends_the_run_and_says_so(start: Start) -> None:
    run = start("--kill-rank")
    status = wait_for(run, Phase.FAILED)
    failure = explain_failure(run, status)
    assert failure is not None
    assert failure.cause == "killed"
    assert any("exitcode: -9" in line for line in failure.evidence)


def test_a_deleted_folder_is_lost_and_not_made_anew(start: Start) -> None:
    run = start("--steps", "100000", "--step-seconds", "0.5")
    wait_for_step(run)
    shutil.rmtree(
        run.path.rename(run.path.with_name("gone"))
    )  # at once: what writes there meanwhile makes nothing anew
    wait_until(lambda: processes.marked(str(run.path)) == [])
    assert read_status(run).phase is Phase.LOST
    assert not run.path.exists()
