"""The processes of one run, as its supervisor sees them: who they are, when one ends and how. Stdlib only; decides nothing."""

import os
import select
import signal
from typing import Final

from core.runs import processes
from core.runs.directory import RunDirectory
from core.runs.processes import ProcessIdentity, ProcessStat
from core.runs.state import SUPERVISOR_MODULE

POLL_SECONDS: Final = 0.25


class Members:
    """Everything below the supervisor (this process), and after an adoption everything that carries the run's mark."""

    def __init__(self, run: RunDirectory, *, is_adopting: bool) -> None:
        self._run, self._is_adopting = run, is_adopting
        self.first: ProcessIdentity | None = None
        """The run's first process: with it the run ends."""
        self.wait_status: int | None = None
        """Of the first process, once it has ended; only a parent is told."""
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def prepare(self) -> None:
        """Become the parent of orphans, so that none can slip away; wake up when a child ends."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        processes.adopt_orphans()

    def is_over(self) -> bool:
        """Whether the first process has ended."""
        if self._is_adopting:
            return self.first is None or not self.first.is_alive()
        return self.wait_status is not None

    def living(self) -> list[ProcessStat]:
        """All living processes of the run. A run that this one started has a supervisor of its own and is none of ours."""
        found = {stat.pid: stat for stat in processes.descendants(os.getpid(), leave_out=_is_supervisor)}
        if self._is_adopting:
            found |= {stat.pid: stat for stat in processes.marked(str(self._run.path))}
        found.pop(os.getpid(), None)
        return list(found.values())

    def send(self, number: signal.Signals) -> None:
        processes.send([stat.pid for stat in self.living()], number)

    def wait(self, seconds: float = POLL_SECONDS) -> None:
        """Until a child ends or a signal comes, at most `seconds`; whoever has ended is taken leave of."""
        select.select([self._wake_read], [], [], seconds)
        try:
            while os.read(self._wake_read, 512):
                pass
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self.first is not None and pid == self.first.pid:
                self.wait_status = status


def decode(status: int | None) -> tuple[int | None, int | None]:
    """Exit code and signal number of a wait status."""
    if status is None:
        return None, None
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), None


def _is_supervisor(stat: ProcessStat) -> bool:
    return SUPERVISOR_MODULE in processes.command_line(stat.pid)
