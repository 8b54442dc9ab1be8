"""Watches over one run: `python -m core.runs.supervisor RUN_DIR`. Waits for its GPUs, starts its command, keeps state.json, stops it.

It has its own session and reads and writes only files, so it outlives the server, the terminal and the login. Stdlib only
(GPU sensors through pynvml, if there is one): nothing that can break with the training stack. With `--adopt` it takes
over a run whose supervisor was killed. A run has one supervisor: a second one ends at once.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

from core.runs import processes
from core.runs.devices import Claim, wanted
from core.runs.directory import SCHEMA_VERSION, RunDirectory, RunSpec
from core.runs.gpu_sensors import bytes_left, gpu_memory_bytes
from core.runs.members import Members, decode
from core.runs.sampling import Sampler
from core.runs.state import is_supervised, process_identity, read_status
from core.runs.state_writer import StateWriter
from core.runs.stop import Stop, end_leftovers, final_phase, requested
from core.runs.watch import Watch

_GONE_SECONDS: Final = 30.0
"""How long the run's directory may be missing before the run is cancelled: nobody could see it or stop it any more."""
_EXIT_NOT_STARTED: Final = 127
EXIT_SUPERVISED: Final = 4
"""Another supervisor has this run."""
_LAST_WORD_SECONDS: Final = 30.0
"""How long the supervisor of an attempt that has ended may still be there: it tells the webhook."""
_LOCK_POLL_SECONDS: Final = 0.05


class Supervisor:
    """The life of one run, from start to the last of its processes."""

    def __init__(self, run: RunDirectory, spec: RunSpec, *, is_adopting: bool = False) -> None:
        self.run, self.spec = run, spec
        self._is_adopting = is_adopting
        self._writer = StateWriter(run.state_file)
        self._claim = Claim(run.path, wanted(spec))
        self._phase = "queued"
        self._members = Members(run, is_adopting=is_adopting)
        self._queued_at = time.time()
        self._started_at: float | None = None
        self._gpu_bytes_before: int | None = None
        self._earlier_joules, self._earlier_seconds = _earlier_attempts(run, is_adopting=is_adopting)
        self._ended: dict[str, Any] = {}
        self._stop: Stop | None = None
        self._is_told_to_end = False
        self._missing_since: float | None = None
        self._oom_kills = processes.oom_kills()
        self._sampler = Sampler(run.gpu_file, run.path, gpus=spec.gpus) if spec.kind == "train" else None
        self._watch = Watch(run, spec, self._sampler) if spec.kind == "train" else None

    def prepare(self) -> None:
        """Take the signals, become the parent of orphans, write the first state.json."""
        self._members.prepare()
        signal.signal(signal.SIGHUP, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        if self._is_adopting:
            self._adopt()
        elif self._has_turn():
            self._phase = "starting"
        self._write()

    def supervise(self) -> int:
        """Run the command to its end. Returns 0: how the run ended is in state.json."""
        if not self._is_adopting and not (self._wait_for_turn() and self._start()):
            return 0
        if self._sampler:
            self._sampler.start()
        if self._is_adopting:
            self._look_for_stop()  # the run may have heard it, and ended, before we came
        while not self._members.is_over():
            self._members.wait()
            self._look_for_stop()
            self._look_for_directory()
            self._look_at_health()
            if self._stop and self._stop.escalate(self._members, self.spec.stop_seconds):
                self._write()
        end_leftovers(self._members, self._stop)
        if self._sampler:
            self._sampler.stop()
        if self._watch:
            self._watch.end()
        self._finish()
        if self._watch:
            self._watch.close(self._phase)
        return 0

    def _adopt(self) -> None:
        self._members.first, self._phase = process_identity(self.run), "running"
        self._started_at = read_status(self.run).started_at or time.time()
        if self._members.first is None and (living := self._members.living()):
            self._members.first = processes.identify(living[0].pid)
        if self._has_turn():
            self._claim.record(self._members.first)

    def _has_turn(self) -> bool:
        """Whether the run's devices are its own now. Where no lock can be kept, nobody waits for one."""
        try:
            return self._claim.take()
        except OSError as error:
            print(f"no locks for devices: {error}", file=sys.stderr, flush=True)
            return True

    def _wait_for_turn(self) -> bool:
        """Until the devices are free; False if the run was cancelled before that."""
        shown = list(self._claim.waits_for)
        while self._phase == "queued" and not self._has_turn():
            if self._claim.waits_for != shown:
                shown = list(self._claim.waits_for)
                self._write()
            self._members.wait()
            self._look_for_directory()
            if self._is_told_to_end or requested(self.run.stop_file):
                self._claim.release()
                self._phase = "cancelled"
                self._ended = {"ended_at": time.time()}
                self._write()
                return False
        self._phase = "starting"
        return True

    def _start(self) -> bool:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.spec.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.spec.gpus)
        environment |= self.spec.env | {processes.RUN_VARIABLE: str(self.run.path)}
        self._started_at = time.time()
        self._gpu_bytes_before = gpu_memory_bytes(self.spec.gpus)
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
                self._claim.release()
                self._phase = "failed"
                self._ended = {"ended_at": time.time(), "exit_code": _EXIT_NOT_STARTED, "signal": None}
                self._write()
                return False
        self._members.first = processes.identify(process.pid)
        process.returncode = 0  # It is reaped below with everything else, not by subprocess.
        self._phase = "running"
        self._claim.record(self._members.first)
        self._write()
        return True

    def _end(self, *_: object) -> None:
        self._is_told_to_end = True

    def _look_for_stop(self) -> None:
        request: tuple[str, str | None] | None = requested(self.run.stop_file)
        if self._is_told_to_end:
            request = ("cancel", None)
        elif self._watch and self._watch.cancel_reason:
            request = ("cancel", self._watch.cancel_reason)
        if request is None:
            return
        mode, reason = request
        if self._stop is None:
            self._stop = Stop(mode, time.time(), reason)
            self._phase = "stopping"
            self._write()
        elif mode == "cancel" and self._stop.mode == "save":
            self._stop.mode, self._stop.reason = mode, reason
            self._write()

    def _look_at_health(self) -> None:
        """The run matters more than what is thought of it: a watch that stumbles is given up, and says so in our log."""
        if self._watch is None:
            return
        try:
            self._watch.look()
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError):
            traceback.print_exc()
            self._watch = None

    def _look_for_directory(self) -> None:
        if self.run.path.is_dir():
            self._missing_since = None
            return
        now = time.monotonic()
        self._missing_since = self._missing_since or now
        if now - self._missing_since > _GONE_SECONDS:
            self._is_told_to_end = True

    def _finish(self) -> None:
        code, number = decode(self._members.wait_status)
        ended_at = time.time()
        left_bytes = bytes_left(self.spec.gpus, self._gpu_bytes_before, self._members.wait)
        self._claim.release()  # before anyone reads that the run has ended, and does not wait for a webhook that hangs
        self._phase = final_phase(self._stop, code, is_adopting=self._is_adopting)
        self._ended = {
            "ended_at": ended_at,
            "exit_code": code,
            "signal": number,
            "gpu_bytes_left": left_bytes,
            "energy_joules": self._earlier_joules + (self._sampler.energy_joules if self._sampler else 0.0),
            "peak_gpu_bytes": self._sampler.peak_gpu_bytes if self._sampler else 0,
        }
        self._write()

    def _write(self) -> None:
        supervisor = processes.identify(os.getpid())
        self._writer.write(
            {
                "schema_version": SCHEMA_VERSION,
                "phase": self._phase,
                "supervisor": supervisor.to_json() if supervisor else None,
                "process": self._members.first.to_json() if self._members.first else None,
                "queued_at": self._queued_at,
                "waits_for": [holder.to_json() for holder in self._claim.waits_for] if self._phase == "queued" else [],
                "started_at": self._started_at,
                "ended_at": None,
                "exit_code": None,
                "signal": None,
                "earlier_seconds": self._earlier_seconds,
                **self._ended,
                "stop": self._stop.to_json() if self._stop else None,
                "oom_kills": processes.oom_kills() - self._oom_kills,
            }
        )


def _earlier_attempts(run: RunDirectory, *, is_adopting: bool) -> tuple[float, float]:
    """Joules and seconds of the attempts before this one, in the same folder."""
    if not run.state_file.exists():
        return 0.0, 0.0
    before = read_status(run)
    seconds = 0.0 if is_adopting else before.elapsed_seconds() or 0.0
    return before.energy_joules or 0.0, before.earlier_seconds + seconds


def _is_alone(run: RunDirectory) -> bool:
    """Whether this process is the run's only supervisor; it stays that as long as it lives, its child after the fork too.

    Waits for one that says its last word, and for a server that only looks whether there is a run already.
    """
    handle = os.open(run.supervisor_lock, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _LAST_WORD_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_supervised(run) or time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError as error:  # NFS without its lock service: state.json has to do
            print(f"no lock for the run: {error}", file=sys.stderr, flush=True)
            return not is_supervised(run)
        else:
            return True  # the descriptor stays open: the lock lives as long as it does


def main(argv: list[str]) -> int:
    """Go to the background and supervise; the caller's process ends as soon as the first state.json is written."""
    run = RunDirectory(Path(argv[-1]).absolute())
    if not _is_alone(run):
        return EXIT_SUPERVISED
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
