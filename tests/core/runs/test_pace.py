"""How often the disk is asked, and how much at once: decided by what its answers took. Time here is counted, not waited for."""

import threading

from core.runs.pace import Pace, ask_all
from tests.slow_disk import Clock

WAIT_SECONDS = 240.0
"""For what hangs, not for what is slow."""


def ask(pace: Pace, clock: Clock, seconds: float) -> bool:
    """One question that takes `seconds`, if it is due."""
    if not pace.is_due():
        return False
    with pace.taken():
        clock.sleep(seconds)
    return True


def test_a_quick_disk_is_always_asked() -> None:
    clock = Clock()
    pace = Pace(now=clock)
    assert all(ask(pace, clock, 4e-4) for _ in range(100))


def test_a_slow_one_gets_its_share_of_the_time_and_no_pause_is_long() -> None:
    clock = Clock()
    pace = Pace(share=0.1, longest_seconds=5.0, now=clock)
    assert [ask(pace, clock, 0.2) for _ in range(4)] == [True, True, True, False], "three in a row are the disk's fault"
    clock.sleep(1.9)
    assert not pace.is_due()
    clock.sleep(0.2)
    assert ask(pace, clock, 60.0)
    assert ask(pace, clock, 60.0) is False
    clock.sleep(5.0)
    assert pace.is_due()


def test_one_slow_answer_is_the_machines_fault() -> None:
    clock = Clock()
    pace = Pace(now=clock)
    assert all(ask(pace, clock, seconds) for seconds in (1e-5, 1.0, 1.0, 1e-5, 1.0, 1e-5))


def test_many_are_asked_at_once_where_the_disk_is_slow() -> None:
    clock, together = Clock(), threading.Barrier(4)

    def answer(number: int) -> int:
        if number < 3:
            clock.sleep(0.05)
        else:
            together.wait(WAIT_SECONDS)  # passes only if four ask at the same time
        return -number

    assert ask_all(answer, range(11), now=clock) == [-number for number in range(11)]


def test_one_after_the_other_where_it_is_quick() -> None:
    threads = set()

    def answer(number: int) -> int:
        threads.add(threading.get_ident())
        return number

    assert ask_all(answer, range(50), now=Clock()) == [*range(50)]
    assert threads == {threading.get_ident()}
    assert ask_all(answer, [], now=Clock()) == []
