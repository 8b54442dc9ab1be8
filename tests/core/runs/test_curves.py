"""Downsampling keeps extremes; smoothing is the debiased average; progress counts what it should."""

import numpy as np
import pytest

from core.runs.curves import downsample, ratio, smooth
from core.runs.metrics import COLUMNS, Metrics, merge_resumes
from core.runs.progress import measure, recent_loss, tokens_per_second


def metrics_of(**columns: list[float]) -> Metrics:
    count = len(columns["iteration"])
    rows = np.full((count, len(COLUMNS)), np.nan)
    for name, values in columns.items():
        rows[:, COLUMNS.index(name)] = values
    return merge_resumes(rows)


def test_every_spike_survives_downsampling() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[12_345, 77_777]] = [50, -50]
    chosen = downsample(values, 2000)
    assert len(chosen) <= 2000
    assert {0, 12_345, 77_777, 99_999} <= set(chosen.tolist())
    assert (np.diff(chosen) > 0).all()


def test_downsampling_leaves_out_what_cannot_be_drawn() -> None:
    assert downsample(np.array([1.0, np.nan, np.inf, 2.0])).tolist() == [0, 3]
    assert downsample(np.full(10, np.nan)).tolist() == []


def test_ratio_is_that_of_the_sums() -> None:
    amounts = np.array([10.0, 30, np.nan, 50, 7])
    seconds = np.array([1.0, 1, 9, 5, np.nan])
    places, values = ratio(amounts, seconds, 2)
    assert places.tolist() == [1, 4]
    assert values.tolist() == [20, 10]
    assert ratio(amounts[:0], seconds[:0])[1].tolist() == []
    assert np.isnan(ratio(amounts[4:], seconds[4:])[1]).all()


def test_smoothing_is_adams_debiased_average() -> None:
    values = np.array([4.0, 2.0, 6.0, 3.0])
    average, expected = 0.0, []
    for step, value in enumerate(values, 1):
        average = 0.9 * average + 0.1 * value
        expected.append(average / (1 - 0.9**step))
    np.testing.assert_allclose(smooth(values, 0.9), expected)


def test_smoothing_passes_over_nan() -> None:
    smoothed = smooth(np.array([1.0, np.nan, 1.0, np.inf, 1.0]), 0.9)
    np.testing.assert_allclose(smoothed[[0, 2, 4]], 1.0)
    with pytest.raises(ValueError, match="weight"):
        smooth(np.ones(3), 1.0)


def test_remaining_time_counts_pauses_but_not_the_time_before_a_resume() -> None:
    # Ten steps of 1 s, then a week off, then ten steps of 1 s with one evaluation of 20 s among them.
    at = [float(n) for n in range(10)] + [700_000.0 + n + (20 if n > 5 else 0) for n in range(10)]
    metrics = metrics_of(
        iteration=list(range(1, 21)), total_iterations=[120.0] * 20, at=at, step_seconds=[1.0] * 20, loss=[1.0] * 20
    )
    progress = measure(metrics, started_at=699_990.0)
    assert progress.remaining_seconds == pytest.approx(100 * (1 + 20 / 9))
    assert progress.fraction == pytest.approx(20 / 120)


def test_progress_without_metrics() -> None:
    progress = measure(metrics_of(iteration=[]))
    assert (progress.iteration, progress.fraction, progress.remaining_seconds) == (0, None, None)


def test_the_loss_is_the_mean_of_the_last_ten_numbers() -> None:
    losses = [float(n) for n in range(1, 21)]
    losses[18] = np.nan
    metrics = metrics_of(iteration=list(range(1, 21)), loss=losses)
    assert recent_loss(metrics) == pytest.approx(np.mean([10, *range(11, 19), 20]))
    assert recent_loss(metrics, until=12) == pytest.approx(np.mean(range(3, 13)))
    assert recent_loss(metrics, until=2) == 1.5
    assert recent_loss(metrics, until=0) is None
    assert measure(metrics).loss == recent_loss(metrics)


def test_tokens_per_second_over_the_time_of_the_steps() -> None:
    metrics = metrics_of(iteration=[1, 2, 3], tokens=[100, 300, np.nan], step_seconds=[1.0, 1.0, 5.0])
    assert tokens_per_second(metrics) == 200
