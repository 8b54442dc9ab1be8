"""kill -9 of each part of a run, also inside a save: what looks like a whole checkpoint is one, and training goes on from it."""

import random
from pathlib import Path

import pytest

from benchmarks.kills import MOST_LOST, VICTIMS, kill_once


@pytest.mark.engine
def test_five_kills_leave_whole_checkpoints_and_no_process(tmp_path: Path) -> None:
    chance = random.Random(3)
    reached = 0
    for number, victim in enumerate(VICTIMS):
        kill = kill_once(tmp_path, number, victim, chance)
        assert not kill.broken, kill
        assert kill.kept is not None, kill
        assert kill.kept >= kill.reached - MOST_LOST, kill
        assert kill.left_processes == 0, kill
        if number:
            assert kill.started_at == reached + 1, "it went on from the newest whole checkpoint"
        reached = kill.kept
