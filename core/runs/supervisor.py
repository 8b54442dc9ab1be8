"""Watches over one run: `python -m core.runs.supervisor RUN_DIR`. Starts its command, keeps state.json, stops it on request.

It has its own session and reads and writes only files, so it outlives the server, the terminal and the login. Stdlib only
(GPU sensors through pynvml, if there is one): nothing that can break with the training stack. With `--adopt` it takes
over a run whose supervisor was killed.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.runs import processes
from core.runs.directory import SCHEMA_VERSION, RunDirectory, RunSpec
from core.runs.processes import ProcessIdentity, ProcessStat
from core.runs.sampling import Sampler
from core.runs.state import process_identity, read_status
from core.runs.state_writer import StateWriter

KILL_SECONDS: Final = 15.0
"""From SIGTERM to SIGKILL."""
_POLL_SECONDS: Final = 0.25
_LEFTOVER_SECONDS: Final = 2.0
"""How long children may outlive the first process before they are told to end."""
_GONE_SECONDS: Final = 30.0
"""How long the run's directory may be missing before the run is cancelled: nobody could see it or stop it any more."""
_GIVE_UP_SECONDS: Final = 60.0
"""After this even SIGKILL has not helped: the process hangs in the kernel, and the run's end is written all the same."""
_EXIT_NOT_STARTED: Final = 127
EXIT_EXPLAINED: Final = 3
"""A job's own exit code for an error it explained (core.runs.job), which is how it answers a stop."""


@dataclass
class _Stop:
    """A stop that was asked for, and how far it has come."""

    mode: str
    requested_at: float
    began: float = field(default_factory=time.monotonic)
    terminated: float | None = None
    """Monotonic time of SIGTERM."""
    is_killed: bool = False

    def to_json(self) -> dict[str, Any]:
        sent = "SIGKILL" if self.is_killed else "SIGTERM" if self.terminated is not None else None
        return {"mode": self.mode, "requested_at": self.requested_at, "sent": sent}


class Supervisor:
    """The life of one run, from start to the last of its processes."""

    def __init__(self, run: RunDirectory, spec: RunSpec, *, is_adopting: bool = False) -> None:
        self.run, self.spec = run, spec
        self._is_adopting = is_adopting
        self._writer = StateWriter(run.state_file)
        self._phase = "starting"
        self._process: ProcessIdentity | None = None
        self._started_at = time.time()
        self._ended: dict[str, Any] = {}
        self._wait_status: int | None = None
        self._stop: _Stop | None = None
        self._is_told_to_end = False
        self._missing_since: float | None = None
        self._oom_kills = processes.oom_kills()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._sampler = Sampler(run.gpu_file, run.path) if spec.kind == "train" else None

    def prepare(self) -> None:
        """Take the signals, become the parent of orphans, write the first state.json."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        processes.adopt_orphans()
        if self._is_adopting:
            self._adopt()
        self._write()

    def supervise(self) -> int:
        """Run the command to its end. Returns 0: how the run ended is in state.json."""
        if not self._is_adopting and not self._start():
            return 0
        if self._sampler:
            self._sampler.start()
        while not self._is_over():
            select.select([self._wake_read], [], [], _POLL_SECONDS)
            self._drain()
            self._reap()
            self._look_for_stop()
            self._look_for_directory()
            self._escalate()
        self._end_leftovers()
        if self._sampler:
            self._sampler.stop()
        self._finish()
        return 0

    def _adopt(self) -> None:
        self._process, self._phase = process_identity(self.run), "running"
        self._started_at = read_status(self.run).started_at or self._started_at
        if self._process is None:
            members = self._members()
            self._process = processes.identify(members[0].pid) if members else None

    def _start(self) -> bool:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.spec.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.spec.gpus)
        environment |= self.spec.env | {processes.RUN_VARIABLE: str(self.run.path)}
        with open(self.run.log_file, "ab") as log:
            try:
                process = subprocess.Popen(
                    self.spec.argv,
                    cwd=self.spec.cwd,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                self._phase = "failed"
                self._ended = {"ended_at": time.time(), "exit_code": _EXIT_NOT_STARTED, "signal": None}
                self._write()
                return False
        self._process = processes.identify(process.pid)
        process.returncode = 0  # It is reaped below with everything else, not by subprocess.
        self._phase = "running"
        self._write()
        return True

    def _is_over(self) -> bool:
        if self._is_adopting:
            return self._process is None or not self._process.is_alive()
        return self._wait_status is not None

    def _members(self) -> list[ProcessStat]:
        """All living processes of the run: our descendants and, after an adoption, those that carry its mark."""
        found = {stat.pid: stat for stat in processes.descendants(os.getpid())}
        if self._is_adopting:
            found |= {stat.pid: stat for stat in processes.marked(str(self.run.path))}
        found.pop(os.getpid(), None)
        return list(found.values())

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._process is not None and pid == self._process.pid:
                self._wait_status = status

    def _drain(self) -> None:
        try:
            while os.read(self._wake_read, 512):
                pass
        except BlockingIOError:
            return

    def _end(self, *_: object) -> None:
        self._is_told_to_end = True

    def _look_for_stop(self) -> None:
        mode = "cancel" if self._is_told_to_end else _requested_mode(self.run.stop_file)
        if mode is None:
            return
        if self._stop is None:
            self._stop = _Stop(mode, time.time())
            self._phase = "stopping"
            self._write()
        elif mode == "cancel" and self._stop.mode == "save":
            self._stop.mode = mode
            self._write()

    def _look_for_directory(self) -> None:
        if self.run.path.is_dir():
            self._missing_since = None
            return
        now = time.monotonic()
        self._missing_since = self._missing_since or now
        if now - self._missing_since > _GONE_SECONDS:
            self._is_told_to_end = True

    def _escalate(self) -> None:
        """Waiting for the save → SIGTERM → SIGKILL."""
        stop = self._stop
        if stop is None or stop.is_killed:
            return
        now = time.monotonic()
        if stop.terminated is None:
            if stop.mode == "cancel" or now - stop.began > self.spec.stop_seconds:
                stop.terminated = now
                processes.send([stat.pid for stat in self._members()], signal.SIGTERM)
                self._write()
        elif now - stop.terminated > KILL_SECONDS:
            stop.is_killed = True
            processes.send([stat.pid for stat in self._members()], signal.SIGKILL)
            self._write()

    def _end_leftovers(self) -> None:
        """The first process has ended: whatever it left behind must end too, in its own time, by SIGTERM, by SIGKILL."""
        began = time.monotonic()
        has_terminated = has_killed = False
        while (members := self._members()) and (elapsed := time.monotonic() - began) < _GIVE_UP_SECONDS:
            pids = [stat.pid for stat in members]
            if not has_terminated and elapsed > _LEFTOVER_SECONDS:
                has_terminated = True
                processes.send(pids, signal.SIGTERM)
            if self._is_time_to_kill(elapsed):
                has_killed = True
                processes.send(pids, signal.SIGKILL)
            select.select([self._wake_read], [], [], 0.05 if has_killed else _POLL_SECONDS)
            self._drain()
            self._reap()

    def _is_time_to_kill(self, leftover_seconds: float) -> bool:
        if self._stop is not None and self._stop.terminated is not None:
            return self._stop.is_killed or time.monotonic() - self._stop.terminated > KILL_SECONDS
        return leftover_seconds > _LEFTOVER_SECONDS + KILL_SECONDS

    def _finish(self) -> None:
        code, number = _decode(self._wait_status)
        self._phase = self._final_phase(code)
        self._ended = {"ended_at": time.time(), "exit_code": code, "signal": number}
        self._write()

    def _final_phase(self, code: int | None) -> str:
        stop = self._stop
        if stop is None:
            if code is None and self._is_adopting:
                return "lost"  # Only a parent is told how a process ended.
            return "finished" if code == 0 else "failed"
        has_signalled = stop.terminated is not None
        if self._is_adopting:
            return "cancelled" if has_signalled else "stopped"
        if code == 0 and not has_signalled:
            return "stopped" if stop.mode == "save" else "finished"
        return "cancelled" if has_signalled or code == EXIT_EXPLAINED else "failed"

    def _write(self) -> None:
        supervisor = processes.identify(os.getpid())
        self._writer.write(
            {
                "schema_version": SCHEMA_VERSION,
                "phase": self._phase,
                "supervisor": supervisor.to_json() if supervisor else None,
                "process": self._process.to_json() if self._process else None,
                "started_at": self._started_at,
                "ended_at": None,
                "exit_code": None,
                "signal": None,
                **self._ended,
                "stop": self._stop.to_json() if self._stop else None,
                "oom_kills": processes.oom_kills() - self._oom_kills,
            }
        )


def _requested_mode(stop_file: Path) -> str | None:
    """`save` or `cancel` if a person asked to stop. A request that cannot be read is the gentler one."""
    try:
        request = json.loads(stop_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return "save" if stop_file.exists() else None
    return "cancel" if isinstance(request, dict) and request.get("mode") == "cancel" else "save"


def _decode(status: int | None) -> tuple[int | None, int | None]:
    """Exit code and signal number of a wait status."""
    if status is None:
        return None, None
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), None


def main(argv: list[str]) -> int:
    """Go to the background and supervise; the caller's process ends as soon as the first state.json is written."""
    run = RunDirectory(Path(argv[-1]).absolute())
    supervisor = Supervisor(run, run.spec(), is_adopting="--adopt" in argv)
    ready_read, ready_write = os.pipe()
    if os.fork():
        os.close(ready_write)
        return 0 if os.read(ready_read, 1) else 1
    os.close(ready_read)
    os.setsid()
    supervisor.prepare()
    os.write(ready_write, b"1")
    os.close(ready_write)
    return supervisor.supervise()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
