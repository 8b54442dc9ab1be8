"""Alerts: a healthy run raises none, every fault is found, and each has a beginning and an end."""

import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from core.i18n import catalog
from core.runs.health import MAX_ALERTS, Alert, Health
from core.runs.health_machine import MACHINE_DETECTORS
from core.runs.health_training import STEP_DETECTORS
from core.runs.watch import STOP_KINDS

KINDS = {detector.kind for detector in (*STEP_DETECTORS, *MACHINE_DETECTORS)} | {"stalled", "slow_start", "disk"}


def row(iteration: int, loss: float, **more: Any) -> dict[str, Any]:
    usual = {"total_iterations": 100_000, "grad_norm": 0.5, "step_seconds": 1.0, "data_seconds": 0.01}
    return {"iteration": iteration, "loss": loss, **usual, **more}


def feed(health: Health, rows: Iterable[dict[str, Any]]) -> None:
    for number, each in enumerate(rows):
        health.see_step(each, 1000.0 + number, float(number))


def kinds(health: Health) -> list[str]:
    return [alert.kind for alert in health.alerts]


def test_every_alert_has_words_in_both_languages() -> None:
    for language in ("zh", "en"):
        sentences = catalog(language).sentences
        for kind in KINDS:
            assert {f"health.kinds.{kind}", f"health.alerts.{kind}.what", f"health.alerts.{kind}.next"} <= set(
                sentences
            )
    assert set(STOP_KINDS) <= KINDS


@settings(max_examples=25, deadline=None)
@given(seed=some.integers(0, 10_000), noise=some.floats(0.02, 0.35), accumulation=some.sampled_from([1, 4, 16]))
def test_a_healthy_run_raises_no_alarm(seed: int, noise: float, accumulation: int) -> None:
    generator = random.Random(seed)
    health = Health()
    feed(
        health,
        (
            row(
                step,
                (1.0 + 2.0 * math.exp(-step / 600)) * generator.lognormvariate(0, noise),
                grad_norm=generator.lognormvariate(0, 0.5) if step % accumulation == 0 else None,
                step_seconds=generator.uniform(0.9, 1.4),
            )
            for step in range(1, 1500)
        ),
    )
    assert kinds(health) == []


def test_one_nan_is_a_warning_three_are_an_error() -> None:
    told: list[tuple[str, str]] = []
    health = Health(opened=lambda alert: told.append((alert.kind, alert.level)))
    feed(health, [row(1, 2.0), row(2, math.nan)])
    assert [(alert.kind, alert.level, alert.iteration) for alert in health.open] == [("nan", "warning", 2)]
    feed(health, [row(3, math.inf), row(4, math.nan)])
    assert health.open[0].params == {"count": 3, "first": 2}
    assert told == [("nan", "warning"), ("nan", "error")]
    feed(health, [row(step, 2.0) for step in range(5, 16)])
    assert health.open == []
    assert health.alerts[0].until is not None


def test_gradients_that_are_no_numbers() -> None:
    health = Health()
    feed(health, [row(1, 2.0, grad_norm=math.nan), row(2, 2.0, grad_norm=None), row(3, 2.0, grad_norm=math.inf)])
    assert kinds(health) == []
    feed(health, [row(4, 2.0, grad_norm=math.nan)])
    assert kinds(health) == ["grad_nan"]


def test_spike_ends_by_itself() -> None:
    generator = random.Random(0)
    losses = [2 + generator.gauss(0, 0.1) for _ in range(300)]
    losses[200:205] = [6.0] * 5
    health = Health()
    feed(health, [row(step, loss) for step, loss in enumerate(losses, 1)])
    assert kinds(health) == ["spike"]
    spike = health.alerts[0]
    assert spike.iteration is not None
    assert 201 <= spike.iteration <= 205
    assert spike.params["usual"] == pytest.approx(2, abs=0.1)
    assert spike.until is not None


def test_divergence_says_where_it_was_best() -> None:
    losses = [3 * math.exp(-step / 100) + 1 for step in range(400)] + [1 + 0.03 * step for step in range(400)]
    health = Health()
    feed(health, [row(step, loss) for step, loss in enumerate(losses, 1)])
    found = next(alert for alert in health.alerts if alert.kind == "divergence")
    assert found.level == "error"
    assert 380 <= found.params["best_at"] <= 460


def test_plateau_only_when_nothing_is_gained() -> None:
    generator = random.Random(1)
    flat, falling = Health(), Health()
    feed(flat, [row(step, 2 + generator.gauss(0, 0.02), total_iterations=2000) for step in range(1, 1500)])
    feed(falling, [row(step, 3 - step / 1500, total_iterations=2000) for step in range(1, 1500)])
    assert kinds(flat) == ["plateau"]
    assert flat.alerts[0].level == "info"
    assert kinds(falling) == []


def test_exploding_gradients() -> None:
    health = Health()
    feed(health, [row(step, 2.0, grad_norm=0.5 + step % 3 / 10) for step in range(1, 100)])
    feed(health, [row(100, 2.0, grad_norm=80.0)])
    assert kinds(health) == [], "one is clipped and forgotten"
    feed(health, [row(step, 2.0, grad_norm=80.0) for step in range(101, 104)])
    assert kinds(health) == ["grad_explosion"]


def test_slow_data() -> None:
    health = Health()
    feed(health, [row(step, 2.0, data_seconds=0.7) for step in range(1, 60)])
    assert health.open[0].params == {"percent": 70}
    feed(health, [row(step, 2.0) for step in range(60, 120)])
    assert health.open == []


def test_no_step_for_long() -> None:
    health = Health()
    feed(health, [row(step, 2.0) for step in range(1, 60)])
    health.see_time(2000.0, 58 + 119)
    assert kinds(health) == []
    health.see_time(2000.0, 58 + 121)
    assert [(alert.kind, alert.params["usual"]) for alert in health.open] == [("stalled", 1.0)]
    health.see_step(row(60, 2.0), 2001.0, 58 + 122)
    assert health.open == []
    health.see_time(2500.0, 180 + 200)
    assert health.open == [], "a pause as long as one before is no stall"


def test_a_clock_that_jumps_stalls_nothing() -> None:
    health = Health()
    for step in range(1, 100):
        health.see_step(row(step, 2.0), 1e9 if step % 2 else 2e9, float(step))
        health.see_time(0.0, step + 0.5)
    assert kinds(health) == []


def test_a_start_that_takes_too_long() -> None:
    health = Health()
    health.see_time(0.0, 10.0)
    health.see_time(0.0, 1700.0)
    assert kinds(health) == []
    health.see_time(0.0, 2000.0)
    assert kinds(health) == ["slow_start"]
    health.see_step(row(1, 2.0), 0.0, 2001.0)
    assert health.open == []


def sample(**gpu: Any) -> dict[str, Any]:
    return {"gpus": [{"index": 0, "uuid": "mine", **gpu}, {"index": 1, "uuid": "other", "throttle_reasons": 0x40}]}


def test_throttling_of_our_own_gpu_only() -> None:
    health = Health(gpus=("mine",))
    for _ in range(40):
        health.see_machine(sample(throttle_reasons=0x4), 0.0)
    assert kinds(health) == [], "a power cap is the usual limit of a busy card"
    for _ in range(20):
        health.see_machine(sample(throttle_reasons=0x20 | 0x4, temperature_celsius=91, sm_clock_mhz=900), 0.0)
    assert [(alert.kind, alert.subject) for alert in health.open] == [("thermal", "GPU 0")]
    assert health.open[0].params["celsius"] == 91


def test_errors_of_the_card() -> None:
    health = Health(gpus=("0",))
    health.see_machine(sample(ecc_uncorrected=7), 0.0)
    assert kinds(health) == [], "errors from before the run are not its own"
    health.see_machine(sample(ecc_uncorrected=9, xids=[79]), 0.0)
    health.see_machine(sample(ecc_uncorrected=9), 0.0)
    assert {alert.kind: alert.params for alert in health.open} == {
        "ecc": {"gpu": "GPU 0", "count": 2},
        "xid": {"gpu": "GPU 0", "codes": "79"},
    }


def test_idle_gpu_after_it_has_worked() -> None:
    health = Health(gpus=("mine",))
    for _ in range(60):
        health.see_machine(sample(utilization_percent=0), 0.0)
    assert kinds(health) == [], "it loads the model"
    health.see_machine(sample(utilization_percent=95), 0.0)
    for _ in range(30):
        health.see_machine(sample(utilization_percent=1), 0.0)
    assert kinds(health) == ["gpu_idle"]


def test_memory_and_the_oom_killer() -> None:
    health = Health()
    for _ in range(5):
        health.see_machine({"ram_used_bytes": 97, "ram_total_bytes": 100, "oom_kills": 3}, 0.0)
    assert [(alert.kind, alert.params) for alert in health.open] == [("memory", {"percent": 97})]
    health.see_machine({"oom_kills": 4}, 0.0)
    assert health.open[-1].params == {"count": 1}


def test_space_for_the_next_checkpoint() -> None:
    health = Health()
    health.see_space(5 * 2**30, 4 * 2**30, 0.0)
    assert kinds(health) == []
    health.see_space(3 * 2**30, 4 * 2**30, 1.0)
    assert health.open[0].params == {"free_gib": 3.0, "needed_gib": 4.0}
    health.see_space(9 * 2**30, 4 * 2**30, 2.0)
    assert health.open == []


def test_what_lacks_or_is_odd_is_passed_over() -> None:
    health = Health(gpus=("mine",))
    for step in range(200):
        health.see_step({"iteration": step}, 0.0, float(step))
        health.see_step({"loss": None, "grad_norm": "x", "step_seconds": None}, 0.0, float(step))
        health.see_machine({}, 0.0)
        health.see_machine(sample(utilization_percent=None, ecc_uncorrected=None, throttle_reasons=None), 0.0)
    assert kinds(health) == []


def test_alerts_are_bounded_and_survive_json() -> None:
    health = Health()
    for number in range(2 * MAX_ALERTS):
        health.see_space(number % 2, 1, float(number))
    assert len(health.alerts) == MAX_ALERTS
    assert Alert.from_json(health.alerts[-1].to_json() | {"unknown": 1}) == health.alerts[-1]
    health.end(9.0)
    assert health.open == []
