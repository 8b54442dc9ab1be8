"""What happened during a run, as upright lines in its charts: checkpoints, the best of them, resumes, alerts."""

import re
from typing import Final

from core.runs.directory import RunDirectory
from core.runs.metrics import Metrics
from core.runs.validation import best_of
from core.runs.watch import read_alerts
from pages.ui.charts import Mark
from pages.ui.text import t

CHECKPOINT_COLOUR: Final = "#A8A29E"
RESUME_COLOUR: Final = "#0369A1"
ALERT_COLOUR: Final = "#BE123C"
BEST_COLOUR: Final = "#4D7C0F"
_CHECKPOINT: Final = re.compile(r"iter_(\d+)(?:\.pth)?$")
_NEAR: Final = 0.08
"""Part of the axis within which a second word would hide the first."""


def run_marks(run: RunDirectory, metrics: Metrics) -> list[Mark]:
    """Marks over iterations, rising. Only what is rare has a word: the best checkpoint, resumes and alerts."""
    saved = sorted(int(found[1]) for path in run.path.glob("iter_*") if (found := _CHECKPOINT.match(path.name)))
    alerts = [alert for alert in read_alerts(run)[0] if alert.iteration and alert.level != "info"]
    best = best_of(run)
    best_at = best.iteration if best is not None and best.checkpoint is not None else None
    marks = [Mark(iteration, "", CHECKPOINT_COLOUR) for iteration in saved if iteration != best_at]
    marks += [Mark(best_at, t("monitor.mark_best"), BEST_COLOUR)] if best_at is not None else []
    marks += [Mark(iteration, t("monitor.mark_resume"), RESUME_COLOUR) for iteration in metrics.resumed_at]
    marks += [Mark(alert.iteration or 0, t(f"health.kinds.{alert.kind}"), ALERT_COLOUR) for alert in alerts]
    return _readable(sorted(marks, key=lambda mark: mark.x), len(metrics))


def marks_legend(marks: list[Mark]) -> str:
    """What the colours of these marks mean."""
    names = {
        CHECKPOINT_COLOUR: f":gray[┆] {t('monitor.mark_checkpoint')}",
        BEST_COLOUR: f":green[┆] {t('monitor.mark_best')}",
        RESUME_COLOUR: f":blue[┆] {t('monitor.mark_resume')}",
        ALERT_COLOUR: f":red[┆] {t('monitor.mark_alert')}",
    }
    present = {mark.colour for mark in marks}
    return " &emsp; ".join(name for colour, name in names.items() if colour in present)


def _readable(marks: list[Mark], steps: int) -> list[Mark]:
    readable: list[Mark] = []
    last = -float("inf")
    for mark in marks:
        has_room = mark.x - last > _NEAR * steps
        readable.append(mark if has_room else Mark(mark.x, "", mark.colour))
        if mark.label and has_room:
            last = mark.x
    return readable
