"""What a stop does and what it makes of a run: each case without a process; the supervisor's tests end real ones."""

import signal
import time
from pathlib import Path

import pytest

from core.runs.stop import EXIT_EXPLAINED, KILL_SECONDS, Stop, end_leftovers, final_phase, requested


class Members:
    """Processes of a run that end at the signal `ends_at`, on a clock that only their waiting moves."""

    def __init__(self, ends_at: "signal.Signals | None" = None, *, are_alive: bool = True) -> None:
        self.ends_at, self.are_alive = ends_at, are_alive
        self.now = 1000.0
        self.sent: list[signal.Signals] = []
        self.sent_after: list[float] = []

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)
        self.sent_after.append(self.now - 1000.0)
        self.are_alive = self.are_alive and number is not self.ends_at

    def living(self) -> list[int]:
        return [1] if self.are_alive else []

    def wait(self, seconds: float) -> None:
        assert 0 < seconds <= 0.25
        self.now += seconds

    def clock(self) -> float:
        return self.now


def ago(seconds: float) -> float:
    return time.monotonic() - seconds


def test_a_save_is_waited_for_then_told_then_killed() -> None:
    members, stop = Members(), Stop("save", 1.0)
    assert not stop.escalate(members, 600)
    stop.began = ago(700)
    assert stop.escalate(members, 600)
    assert not stop.escalate(members, 600)  # Told once, and given its time.
    assert members.sent == [signal.SIGTERM]
    stop.terminated = ago(KILL_SECONDS + 1)
    assert stop.escalate(members, 600)
    assert not stop.escalate(members, 600)
    assert members.sent == [signal.SIGTERM, signal.SIGKILL]


def test_a_cancel_does_not_wait_for_a_save() -> None:
    members, stop = Members(), Stop("cancel", 1.0)
    assert stop.escalate(members, 600)
    assert members.sent == [signal.SIGTERM]
    assert not stop.is_time_to_kill(time.monotonic())


def test_what_a_stop_did_is_kept_with_the_run() -> None:
    stop = Stop("save", 12.5, "loss_nan")
    expected = {"mode": "save", "requested_at": 12.5, "reason": "loss_nan"}
    assert stop.to_json() == expected | {"sent": None}
    stop.terminated = ago(1)
    assert stop.to_json() == expected | {"sent": "SIGTERM"}
    stop.is_killed = True
    assert stop.to_json() == expected | {"sent": "SIGKILL"}


def test_it_is_not_time_to_kill_what_was_never_told() -> None:
    assert not Stop("save", 1.0).is_time_to_kill(1e9)


def test_children_that_ended_by_themselves_get_no_signal() -> None:
    members = Members(are_alive=False)
    end_leftovers(members, None, members.clock)
    assert members.sent == []


@pytest.mark.parametrize("stop", [None, Stop("save", 1.0)], ids=["a run that ended", "a save that was made"])
def test_children_left_behind_are_told_once_after_two_seconds(stop: Stop | None) -> None:
    members = Members(signal.SIGTERM)
    end_leftovers(members, stop, members.clock)
    assert members.sent == [signal.SIGTERM]
    assert members.sent_after == [pytest.approx(2.25)]


@pytest.mark.parametrize("stop", [None, Stop("save", 1.0)], ids=["a run that ended", "a save that was made"])
def test_children_that_do_not_listen_are_killed_fifteen_seconds_later(stop: Stop | None) -> None:
    members = Members(signal.SIGKILL)
    end_leftovers(members, stop, members.clock)
    assert members.sent == [signal.SIGTERM, signal.SIGKILL]
    assert members.sent_after == [pytest.approx(2.25), pytest.approx(2 + KILL_SECONDS + 0.25)]


def test_children_of_a_run_that_was_told_are_killed_when_its_own_time_is_over() -> None:
    members = Members(signal.SIGKILL)
    end_leftovers(members, Stop("cancel", 1.0, terminated=members.now - KILL_SECONDS + 1), members.clock)
    assert members.sent == [signal.SIGKILL]
    assert members.sent_after == [pytest.approx(1.25)]


def test_what_even_sigkill_does_not_end_is_given_up() -> None:
    members = Members()
    end_leftovers(members, None, members.clock)
    assert members.sent[:2] == [signal.SIGTERM, signal.SIGKILL]
    assert set(members.sent[1:]) == {signal.SIGKILL}
    assert members.now - 1000.0 == pytest.approx(60, abs=0.3)
    assert len(members.sent) > 500  # A twentieth of a second apart: what has ended is seen soon.


@pytest.mark.parametrize(
    ("stop", "code", "expected"),
    [
        (None, 0, "finished"),
        (None, 1, "failed"),
        (None, None, "failed"),
        (Stop("save", 0), 0, "stopped"),
        (Stop("cancel", 0), 0, "finished"),
        (Stop("save", 0), 1, "failed"),
        (Stop("save", 0), None, "failed"),
        (Stop("cancel", 0), EXIT_EXPLAINED, "cancelled"),
        (Stop("save", 0, terminated=1.0), 0, "cancelled"),
        (Stop("save", 0, terminated=1.0), None, "cancelled"),
    ],
)
def test_what_a_run_was_when_its_parent_saw_it_end(stop: Stop | None, code: int | None, expected: str) -> None:
    assert final_phase(stop, code, is_adopting=False) == expected


@pytest.mark.parametrize(
    ("stop", "code", "expected"),
    [
        (None, None, "lost"),
        (None, 0, "finished"),
        (None, 1, "failed"),
        (Stop("save", 0), None, "stopped"),
        (Stop("cancel", 0, terminated=1.0), None, "cancelled"),
    ],
)
def test_a_supervisor_that_took_a_run_over_is_not_told_how_it_ended(
    stop: Stop | None, code: int | None, expected: str
) -> None:
    assert final_phase(stop, code, is_adopting=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"mode": "cancel"}', ("cancel", None)),
        ('{"mode": "save", "reason": "disk_low"}', ("save", "disk_low")),
        ('{"mode": "burn", "reason": 7}', ("save", None)),
        ('{"reason": "disk_low"}', ("save", "disk_low")),
        ("[1]", ("save", None)),
        ('{"mode": "canc', ("save", None)),
    ],
)
def test_a_request_that_cannot_be_read_asks_for_the_gentler_stop(
    tmp_path: Path, text: str, expected: tuple[str, str | None]
) -> None:
    file = tmp_path / "stop.json"
    assert requested(file) is None
    file.write_text(text, encoding="utf-8")
    assert requested(file) == expected
