"""Who may use which GPU: one lock file a device, and a queue of those who wait. Stdlib only (+ pynvml); no daemon.

Every supervisor asks for itself, so waiting runs start without the web server. A lock is the kernel's (flock): it goes when
its holder ends, however that ends. The lock file also names the run's first process, because that can outlive a supervisor that was
killed. Locks count for one user and one boot of the machine, over all projects. Without a GPU, training takes a slot of the CPU.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.runs import processes
from core.runs.directory import RunSpec
from core.runs.processes import ProcessIdentity

CPU: Final = "cpu"
FOLDER_VARIABLE: Final = "DANLU_DEVICES"
"""Environment variable: the folder of locks and queue; for several users who share GPUs, one that all of them can write."""
SLOTS_VARIABLE: Final = "DANLU_CPU_SLOTS"
"""Environment variable: how many training runs may be on the CPU at the same time; 1 if it is not set."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A run that has a device, or that is before us in the queue."""

    device: str
    run: str
    """Path of its directory."""

    def to_json(self) -> dict[str, str]:
        return {"device": self.device, "run": self.run}


def default_folder() -> Path:
    """Where locks and queue of this boot lie."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".local/state/danlu/devices" / (processes.boot_id() or "boot")


def wanted(spec: RunSpec) -> list[str]:
    """Devices that the run of `spec` needs for itself: its GPUs; for training without any, a slot of the CPU; else none.

    A run on a cluster needs none here: its own scheduler hands them out.
    """
    if spec.details.get("launcher") == "slurm":
        return []
    if spec.gpus:
        return list(dict.fromkeys(_uuid(name) for name in spec.gpus))
    return [CPU] if spec.kind == "train" else []


def holders(folder: Path | None = None) -> list[Holder]:
    """Devices that are taken now, and by which run. Only looks."""
    taken = []
    for file in sorted((folder or default_folder()).glob("*.lock")):
        record = _read(file)
        if record and _is_in_use(record):
            taken.append(Holder(_device_of(file), str(record["run"])))
    return taken


def waiting(folder: Path | None = None) -> list[Holder]:
    """Devices that are waited for now, and by which run. Only looks."""
    found = []
    for file in sorted(((folder or default_folder()) / "queue").glob("*.json")):
        ticket = _read(file)
        if ticket is not None and _is_alive(ticket.get("supervisor")):
            found += [Holder(str(device), str(ticket["run"])) for device in ticket.get("devices", [])]
    return found


class Claim:
    """One run's place in the queue, and later the devices it holds."""

    def __init__(self, run: Path, devices: Sequence[str], folder: Path | None = None) -> None:
        self._run, self._devices = str(run), list(devices)
        self._folder = folder or default_folder()
        self._locks: dict[Path, int] = {}
        """Lock file → its descriptor."""
        self._ticket = self._folder / "queue" / f"{time.time_ns():020d}_{os.getpid()}.json"
        self.waits_for: list[Holder] = []
        """Who is in the way, as of the last look."""

    def is_held(self) -> bool:
        return len(self._locks) == len(self._devices)

    def take(self) -> bool:
        """Whether all devices are ours now; never a part of them. Earlier tickets for one of them go first. Raises OSError."""
        if self.is_held():
            return True
        self._ticket.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self._ticket.exists():
                self._queue()
            self.waits_for = self._ahead()
            if not self.waits_for:
                self._lock_all()
            if self.is_held():
                self._ticket.unlink(missing_ok=True)
        return self.is_held()

    def record(self, process: ProcessIdentity | None) -> None:
        """Name the run's first process in the lock files: while it lives the devices stay taken, with or without us."""
        me = processes.identify(os.getpid())
        record = {
            "run": self._run,
            "supervisor": me.to_json() if me else None,
            "process": process.to_json() if process else None,
        }
        for handle in self._locks.values():
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(record).encode(), 0)

    def release(self) -> None:
        """Leave the queue and give the devices back. Never raises: where no lock can be kept, there is none to give back."""
        with suppress(OSError):
            self._ticket.unlink()
        for handle in self._locks.values():
            with suppress(OSError):
                os.ftruncate(handle, 0)
            os.close(handle)
        self._locks.clear()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else looks at the queue meanwhile."""
        handle = os.open(self._folder / "queue.mutex", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _queue(self) -> None:
        me = processes.identify(os.getpid())
        ticket = {"run": self._run, "devices": self._devices, "supervisor": me.to_json() if me else None}
        self._ticket.write_text(json.dumps(ticket), encoding="utf-8")

    def _ahead(self) -> list[Holder]:
        """Living tickets before ours that want one of our devices. Those of dead supervisors are removed."""
        found = []
        for file in sorted(self._ticket.parent.glob("*.json")):
            if file.name >= self._ticket.name:
                break
            ticket = _read(file)
            if ticket is None or not _is_alive(ticket.get("supervisor")):
                file.unlink(missing_ok=True)
                continue
            common = [device for device in ticket.get("devices", []) if device in self._devices]
            found += [Holder(device, str(ticket["run"])) for device in common]
        return found

    def _lock_all(self) -> None:
        for device in self._devices:
            if not any(self._lock(file) for file in _lock_files(self._folder, device)):
                record = next(filter(None, map(_read, _lock_files(self._folder, device))), None)
                self.waits_for.append(Holder(device, str(record["run"]) if record else ""))
        if self.waits_for:
            for handle in self._locks.values():
                os.close(handle)
            self._locks.clear()
        else:
            self.record(None)

    def _lock(self, file: Path) -> bool:
        """Take one lock file, unless someone has it or a process of a killed supervisor still lives on the device."""
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        record = _read(file)
        is_own = record is not None and record["run"] == self._run
        if record and not is_own and _is_in_use(record):
            os.close(handle)
            return False
        self._locks[file] = handle
        return True


def _lock_files(folder: Path, device: str) -> list[Path]:
    if device != CPU:
        return [folder / f"{device.replace('/', '_')}.lock"]
    return [folder / f"{CPU}-{number}.lock" for number in range(1, _cpu_slots() + 1)]


def _cpu_slots() -> int:
    try:
        return max(1, int(os.environ.get(SLOTS_VARIABLE) or 1))
    except ValueError:
        return 1


def _device_of(lock_file: Path) -> str:
    return CPU if lock_file.stem.startswith(f"{CPU}-") else lock_file.stem


def _is_in_use(record: dict[str, Any]) -> bool:
    if _is_alive(record.get("supervisor")) or _is_alive(record.get("process")):
        return True
    return bool(processes.marked(str(record["run"])))


def _is_alive(identity: dict[str, Any] | None) -> bool:
    try:
        return identity is not None and ProcessIdentity.from_json(identity).is_alive()
    except (KeyError, TypeError, ValueError):
        return False


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "run" in value else None


def _uuid(name: str) -> str:
    """A GPU under one name only: indices become UUIDs where NVML knows them."""
    if not name.isdecimal():
        return name
    try:
        import pynvml
    except ImportError:
        return name
    try:
        pynvml.nvmlInit()
        uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(int(name)))
    except pynvml.NVMLError:
        return name
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)
