"""Watches a training run from inside its supervisor: feeds `core.runs.health`, writes alerts.json, stops the run and tells a webhook.

What it does about an alert is in watch.json of the run, read anew when it changes. Stdlib only; nothing here can fail the run.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from core.errors import DanluError
from core.files import write_json
from core.i18n import catalog
from core.messages import message
from core.runs.directory import RunDirectory, RunSpec
from core.runs.health import Alert, Health
from core.runs.sampling import Sampler
from core.runs.state_writer import replace_file
from core.runs.validation import is_validating
from core.runs.webhook import post

LOOK_SECONDS: Final = 1.0
STOP_KINDS: Final = ("nan", "grad_nan", "divergence", "grad_explosion", "stalled", "disk")
"""Alerts for which a person may want the run to stop by itself."""
_NEVER_SAVE: Final = frozenset({"nan", "grad_nan"})
"""Weights that are not numbers must not push the last good checkpoint out."""
_MAX_READ_BYTES: Final = 2**20
_SPACE_SECONDS: Final = 10.0
_CHECKPOINT: Final = re.compile(r"iter_(\d+)(?:\.pth)?$")
_CHECKPOINT_FACTOR: Final = 1.1
_LEAST_FREE_BYTES: Final = 2**30
_LAST_WORD_SECONDS: Final = 15.0
_NOTHING: Final[dict[str, Any]] = {"alerts": [], "webhook": {"sent": 0, "failed": 0, "reason": None}}


@dataclass(frozen=True, slots=True)
class WatchRules:
    """What watch.json says."""

    stop_on: tuple[str, ...] = ("nan", "grad_nan")
    """Kinds of alerts that stop the run once they are errors (or warnings, for gradients)."""
    webhook: str = ""
    """Address that gets a JSON POST for each alert and at the end; empty: none."""
    language: str = "en"
    """Of the sentences that the webhook gets."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "WatchRules":
        stop_on = tuple(kind for kind in value.get("stop_on", cls().stop_on) if kind in STOP_KINDS)
        return cls(stop_on, str(value.get("webhook") or ""), str(value.get("language") or "en"))


def project_rules_file(private: Path) -> Path:
    """The rules for new runs of a project; `private` is its own folder (`core.project.Project.private`)."""
    return private / "watch.json"


def read_rules(file: Path) -> WatchRules:
    """Rules in `file`; the defaults if there is none or it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return WatchRules.from_json(value)
    except (OSError, ValueError, TypeError, AttributeError):
        return WatchRules()


class Watch:
    """Looks once a second at what is new. `send`: what posts to the webhook."""

    def __init__(
        self, run: RunDirectory, spec: RunSpec, sampler: Sampler | None, send: Callable[[str, Any], None] = post
    ) -> None:
        self._run, self._spec, self._sampler, self._send = run, spec, sampler, send
        self._health = Health(tuple(spec.gpus), self._opened)
        self._health.alerts = _earlier(run)
        self._offset = _size(run.metrics_file)
        self._looked = self._measured = 0.0
        self._newest: tuple[Path | None, float, int] = (None, 0.0, 0)
        """The newest checkpoint: where it lies, when it changed, its bytes."""
        self._written: Any = None
        self._rules = WatchRules()
        self._rules_version: tuple[int, ...] | None = None
        self._posts: list[threading.Thread] = []
        self._delivery: dict[str, Any] = dict(_NOTHING["webhook"])
        self._counting = threading.Lock()
        self.cancel_reason: str | None = None
        """Kind of the alert for which the run must end at once, unsaved: its weights are no numbers any more."""

    def look(self) -> None:
        """Read what is new, at most once a second, and act on it."""
        clock = time.monotonic()
        if clock - self._looked < LOOK_SECONDS:
            return
        self._looked, now = clock, time.time()
        self._read_rules()
        for row in self._new_rows():
            self._health.see_step(row, now, clock)
        if is_validating(self._run, now):
            self._health.see_validation(clock)
        self._health.see_time(now, clock)
        while self._sampler and self._sampler.latest:
            self._health.see_machine(self._sampler.latest.popleft(), now)
        if clock - self._measured > _SPACE_SECONDS:
            self._measured = clock
            self._look_at_space(now)
        self._stop_if_asked()
        self._write()

    def end(self) -> None:
        """All processes have ended: nothing is wrong any more, it only was."""
        self._health.end(time.time())
        self._write()

    def close(self, phase: str) -> None:
        """How it ended is known: tell the webhook, and give its messages some time."""
        self._tell("ended", phase, f"runs.phases.{phase}", {})
        deadline = time.monotonic() + _LAST_WORD_SECONDS
        for thread in self._posts:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._write()

    def _new_rows(self) -> list[dict[str, Any]]:
        try:
            with open(self._run.metrics_file, "rb") as stream:
                self._offset = min(self._offset, stream.seek(0, 2))
                stream.seek(self._offset)
                block = stream.read(_MAX_READ_BYTES)
        except OSError:
            return []
        end = block.rfind(b"\n") + 1
        self._offset += end
        rows = []
        for line in block[:end].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def _look_at_space(self, now: float) -> None:
        """What is free, against the size of the newest checkpoint: the next one is written before the oldest is removed."""
        try:
            saved = [
                (int(found[1]), path) for path in self._run.path.iterdir() if (found := _CHECKPOINT.match(path.name))
            ]
            if saved:
                self._measure(max(saved)[1])
            free = shutil.disk_usage(self._run.path).free
        except OSError:
            return
        needed = max(_LEAST_FREE_BYTES, round(_CHECKPOINT_FACTOR * self._newest[2]) if saved else 0)
        self._health.see_space(free, needed, now)

    def _measure(self, checkpoint: Path) -> None:
        """Its size, added up once: it has many files with ZeRO, and on a network share each look at one asks the server."""
        version = (checkpoint, checkpoint.stat().st_mtime)
        if version != self._newest[:2]:
            self._newest = (*version, _tree_bytes(checkpoint))

    def _stop_if_asked(self) -> None:
        for alert in self._health.open:
            is_bad = alert.level == "error" or alert.kind == "grad_explosion"
            if not is_bad or alert.kind not in self._rules.stop_on:
                continue
            if alert.kind in _NEVER_SAVE:
                # No stop.request: the trainer would save for it.
                self.cancel_reason = alert.kind
            elif not self._run.stop_file.exists():
                at = datetime.now(UTC).isoformat(timespec="seconds")
                try:
                    write_json(self._run.stop_file, {"mode": "save", "reason": alert.kind, "at": at})
                except DanluError:
                    return  # no space for a file: the next look tries again

    def _opened(self, alert: Alert) -> None:
        if alert.level != "info":
            self._tell(alert.level, alert.kind, f"health.alerts.{alert.kind}.what", alert.params)

    def _tell(self, level: str, kind: str, key: str, params: Mapping[str, Any]) -> None:
        self._read_rules()
        if not self._rules.webhook:
            return
        event = {
            "event": "end" if level == "ended" else "alert",
            "run": self._run.id,
            "title": self._spec.title,
            "kind": kind,
            "level": level,
            "params": dict(params),
            "text": f"{self._run.id}: {catalog(self._rules.language).say(message(key, **params))}",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        thread = threading.Thread(target=self._post, args=(self._rules.webhook, event), daemon=True)
        self._posts = [each for each in self._posts if each.is_alive()] + [thread]
        thread.start()

    def _post(self, url: str, event: dict[str, Any]) -> None:
        try:
            self._send(url, event)
        except DanluError as error:
            with self._counting:
                self._delivery = {**self._delivery, "failed": self._delivery["failed"] + 1, "reason": str(error)}
        else:
            with self._counting:
                self._delivery = {**self._delivery, "sent": self._delivery["sent"] + 1}

    def _read_rules(self) -> None:
        version = _version(self._run.watch_file)
        if version != self._rules_version:
            self._rules, self._rules_version = read_rules(self._run.watch_file), version

    def _write(self) -> None:
        value = {"alerts": [alert.to_json() for alert in self._health.alerts], "webhook": self._delivery}
        if value == self._written or (self._written is None and value == _NOTHING):
            return
        self._written = value
        try:
            replace_file(self._run.alerts_file, json.dumps(value, ensure_ascii=False).encode())
        except OSError:
            self._written = None  # a full disk or a deleted folder: again at the next look


def inherit_rules(private: Path, run: RunDirectory) -> None:
    """Give a new run the project's rules, if it has any."""
    file = project_rules_file(private)
    if file.exists():
        write_json(run.watch_file, read_rules(file).to_json())


def read_alerts(run: RunDirectory) -> tuple[list[Alert], dict[str, Any]]:
    """The run's alerts, oldest first, and how the webhook's messages went."""
    try:
        value = json.loads(run.alerts_file.read_text(encoding="utf-8"))
        return [Alert.from_json(each) for each in value["alerts"]], dict(value.get("webhook") or {})
    except (OSError, ValueError, KeyError, TypeError):
        return [], {}


def _earlier(run: RunDirectory) -> list[Alert]:
    """Alerts of the attempts before, or of a supervisor that was killed: over, for all we know."""
    alerts, _ = read_alerts(run)
    for alert in alerts:
        alert.until = alert.until or time.time()
    return alerts


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _version(file: Path) -> tuple[int, ...]:
    """Another one after each change; empty where there is no file.

    A file that is replaced within one tick of the file system's clock keeps time and perhaps size, but not its inode.
    """
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _tree_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
