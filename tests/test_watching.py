"""What the benchmark `watching` makes of a run whose cost of being watched is known. Knows no GPU."""

import random

import pytest

from benchmarks.watching import Window, compare, measured

WINDOW_SECONDS, ACCUMULATION = 5.0, 4


def windows(count: int) -> list[Window]:
    """Off on, on off, off on, … as the benchmark does it."""
    return [
        Window(number % 4 in (1, 2), number * WINDOW_SECONDS + 0.5, (number + 1) * WINDOW_SECONDS)
        for number in range(count)
    ]


def lines(cost: float, noise: float, drift: float, count: int = 24) -> list[dict[str, float]]:
    """A training of 0.15 s a micro-step that gets slower by `drift` a second, and by `cost` while it is watched."""
    chance, at, found = random.Random(3), 0.0, []
    for iteration in range(1, 10_000):
        is_watched = int(at / WINDOW_SECONDS) % 4 in (1, 2)
        at += 0.15 * (1 + drift * at + cost * is_watched + chance.gauss(0, noise))
        found.append({"iteration": iteration, "at": round(at, 3)})
        if at > count * WINDOW_SECONDS:
            break
    return found


@pytest.mark.parametrize("cost", [0.0, 0.002, 0.02])
def test_the_cost_is_found_under_noise_and_drift(cost: float) -> None:
    every = windows(24)
    figures = compare([measured(window, lines(cost, 0.003, 1e-4), ACCUMULATION) for window in every])
    low, high, found = figures["cost_low_percent"], figures["cost_high_percent"], figures["cost_percent"]
    assert low is not None
    assert high is not None
    assert found is not None
    assert figures["pairs"] == 12
    assert low <= found <= high
    assert found == pytest.approx(100 * cost, abs=0.15)


def test_steps_across_the_edge_of_a_window_count_for_neither() -> None:
    ends = [{"iteration": ACCUMULATION * number, "at": at} for number, at in enumerate((0.4, 1.0, 2.0, 3.2, 5.1), 1)]
    found = measured(Window(True, 0.5, 5.0), ends, ACCUMULATION)
    assert found is not None
    assert (found.steps, found.step_seconds) == (2, pytest.approx(1.1))
    assert measured(Window(True, 3.0, 5.0), ends, ACCUMULATION) is None


def test_nothing_measured_is_no_figure() -> None:
    figures = compare([None, None])
    assert (figures["pairs"], figures["cost_percent"], figures["noise_percent"]) == (0, None, None)
