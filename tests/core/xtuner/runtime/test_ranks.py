"""Ranks hear one another: what each says, what failed elsewhere, and that one is gone."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def fail_with(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return fail


def nothing() -> None:
    pass


def outcomes(ranks: list[Any], parts: list[Any]) -> list[Exception | None]:
    """What `together` raised on each rank, when each did its part."""
    with ThreadPoolExecutor(2) as pool:
        return [
            done.exception() for done in [pool.submit(one.together, do) for one, do in zip(ranks, parts, strict=True)]
        ]


def test_everyone_hears_everyone_in_order(ranks: list[Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(lambda rank: ranks[rank].gather([rank, "磁盘", None]), range(2)))
    assert heard == [[[0, "磁盘", None], [1, "磁盘", None]]] * 2
    assert [one.is_first for one in ranks] == [True, False]


def test_what_fails_on_one_rank_is_raised_on_all(ranks: list[Any]) -> None:
    from core.xtuner.runtime import failures

    assert outcomes(ranks, [nothing, nothing]) == [None, None]
    full = OSError(errno.ENOSPC, "No space left on device", "/检查点" * 400)
    elsewhere, here = outcomes(ranks, [nothing, fail_with(full)])
    assert here is full
    assert isinstance(elsewhere, OSError)
    assert elsewhere.errno == errno.ENOSPC
    assert "rank 1: OSError" in str(elsewhere)
    explained = failures.explain(elsewhere)
    assert explained is not None
    assert explained.code == "train.disk_full"
    here, elsewhere = outcomes(ranks, [fail_with(RuntimeError("odd")), nothing])
    assert (type(here), type(elsewhere)) == (RuntimeError, RuntimeError)
    assert str(elsewhere) == "rank 0: RuntimeError: odd"
    # Each says what failed at home, and all are ready for the next word.
    both = outcomes(ranks, [fail_with(ValueError("a")), fail_with(KeyError("b"))])
    assert [type(error) for error in both] == [ValueError, KeyError]
    assert outcomes(ranks, [nothing, nothing]) == [None, None]


def test_a_rank_that_dies_is_missed(ranks: list[Any]) -> None:
    """Its connection ends, as that of a process does that is killed."""
    from core.xtuner.runtime.ranks import RankLost

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks[0].together, nothing)
        del ranks[1]._group
        assert isinstance(waiting.exception(), RankLost)
    with pytest.raises(OSError, match="here"):
        ranks[0].together(fail_with(OSError("here")))


def test_a_rank_that_never_says_its_word_is_not_waited_for_without_end(ranks: list[Any]) -> None:
    from core.xtuner.runtime.ranks import RankLost

    ranks[0]._group._set_default_timeout(timedelta(milliseconds=50))
    with pytest.raises(RankLost, match="Timed out"):
        ranks[0].together(nothing)


@pytest.mark.parametrize("named", [None, "eth7"])
@pytest.mark.parametrize(("local_ranks", "is_one"), [("2", True), ("1", False), (None, False)])
def test_ranks_of_one_machine_meet_on_its_loopback(
    monkeypatch: pytest.MonkeyPatch, named: str | None, local_ranks: str | None, is_one: bool
) -> None:
    from core.xtuner.runtime import ranks as room

    seen = []

    def new_group(**options: Any) -> str:
        seen.append((os.environ["GLOO_SOCKET_IFNAME"], options["backend"]))
        return "group"

    monkeypatch.setattr(room, "distributed", SimpleNamespace(new_group=new_group, get_world_size=lambda: 2))
    for variable, value in (("GLOO_SOCKET_IFNAME", named), ("LOCAL_WORLD_SIZE", local_ranks)):
        monkeypatch.delenv(variable, raising=False)
        if value:
            monkeypatch.setenv(variable, value)
    assert room.is_one_machine() is is_one
    assert room.new_group() == "group"
    assert seen == [("lo", "gloo")]
    assert os.environ.get("GLOO_SOCKET_IFNAME") == named
