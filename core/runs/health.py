"""What is wrong with a training run, from its steps and the samples of its machine, as they come. Stdlib only; acts on nothing.

Every detector looks at one thing and says what it finds, or None. `Health` turns findings into alerts with a beginning and an end.
Thresholds are for raw losses of micro-batches, which are noisy: a healthy run must raise none (a test holds that).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from core.runs.findings import Finding, number
from core.runs.health_machine import MACHINE_DETECTORS
from core.runs.health_training import STEP_DETECTORS, Stall

MAX_ALERTS: Final = 200


@dataclass(slots=True)
class Alert:
    """One thing that is or was wrong. Its words are `health.alerts.<kind>.what` and `.next`, filled with `params`."""

    kind: str
    level: str
    """`info`, `warning` or `error`."""
    subject: str
    """The GPU, where it is about one; else empty."""
    since: float
    """Unix seconds."""
    iteration: int | None
    """The latest iteration when it began."""
    params: dict[str, Any] = field(default_factory=dict)
    """The evidence."""
    until: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})


class Health:
    """The alerts of one run. `opened` is called with each new alert, and again when its level rises."""

    def __init__(self, gpus: tuple[str, ...] = (), opened: Callable[[Alert], None] = lambda _: None) -> None:
        self.alerts: list[Alert] = []
        self._opened = opened
        self._iteration: int | None = None
        self._steps = [kind() for kind in STEP_DETECTORS]
        self._machine = [kind(gpus) for kind in MACHINE_DETECTORS]
        self._stall = Stall()

    @property
    def open(self) -> list[Alert]:
        return [alert for alert in self.alerts if alert.until is None]

    def see_step(self, row: Mapping[str, Any], now: float, clock: float) -> None:
        """A line of metrics.jsonl. now: Unix seconds; clock: monotonic seconds."""
        self._iteration = int(number(row, "iteration") or 0)
        self._stall.saw(row, clock)
        self.see_time(now, clock)
        for detector in self._steps:
            self._settle(detector.kind, "", detector.see(row), now)

    def see_machine(self, sample: Mapping[str, Any], now: float) -> None:
        """A line of gpu.jsonl."""
        for detector in self._machine:
            for subject, finding in detector.see(sample).items():
                self._settle(detector.kind, subject, finding, now)

    def see_space(self, free_bytes: int, needed_bytes: int, now: float) -> None:
        """Free space, and what the next checkpoint will take."""
        finding = None
        if free_bytes < needed_bytes:
            finding = Finding("error", {"free_gib": gib(free_bytes), "needed_gib": gib(needed_bytes)})
        self._settle("disk", "", finding, now)

    def see_validation(self, clock: float) -> None:
        """It is validating: no step is due."""
        self._stall.wait(clock)

    def see_time(self, now: float, clock: float) -> None:
        """Nothing has come for a while, perhaps."""
        self._settle("stalled", "", self._stall.look(clock), now)
        self._settle("slow_start", "", self._stall.look_at_start(clock), now)

    def end(self, now: float) -> None:
        """The run is over: nothing is wrong any more, it only was."""
        for alert in self.open:
            alert.until = now

    def _settle(self, kind: str, subject: str, finding: Finding | None, now: float) -> None:
        alert = next((each for each in self.open if (each.kind, each.subject) == (kind, subject)), None)
        if finding is None:
            if alert is not None:
                alert.until = now
        elif alert is None:
            alert = Alert(kind, finding.level, subject, now, self._iteration, finding.params)
            self.alerts.append(alert)
            del self.alerts[:-MAX_ALERTS]
            self._opened(alert)
        else:
            has_risen = finding.level != alert.level
            alert.params, alert.level = finding.params, finding.level
            if has_risen:
                self._opened(alert)


def gib(size_bytes: float) -> float:
    return round(size_bytes / 2**30, 2)
