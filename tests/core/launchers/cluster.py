"""A real Slurm on this machine for tests: munged, slurmctld and two slurmd under one folder, ended with the test session."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.xtuner.command import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd")
_CONFIG = """
ClusterName=danlu
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={first_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
ReturnToService=2
SlurmdTimeout=60
KillWait=3
MinJobAge=60
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=2 RealMemory=500 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=2 RealMemory=500 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """Start the cluster in `folder` and give the path of its slurm.conf; everything that was started is ended."""
    for program in PROGRAMS:
        assert shutil.which(program), f"{program} is not installed: apt-get install munge slurmctld slurmd slurm-client"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    config = folder / "slurm.conf"
    chosen: set[int] = set()
    while len(chosen) < 3:
        chosen.add(free_port())
    ports = dict(zip(("controller_port", "first_port", "second_port"), chosen, strict=True))
    config.write_text(_CONFIG.format(folder=folder, host=socket.gethostname().split(".")[0], **ports), encoding="utf-8")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    commands = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={key}",
         f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-f", str(config)],
        ["slurmd", "-D", "-f", str(config), "-N", "n1"],
        ["slurmd", "-D", "-f", str(config), "-N", "n2"],
    ]  # fmt: skip
    processes = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "ab") as out:
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            _wait_until_it_listens(folder, command[0])
        _wait_until_idle(folder, environment)
        yield config
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, timeout=240, check=False, capture_output=True)
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_listens(folder: Path, program: str) -> None:
    """The others ask munged for their keys; they themselves wait for one another."""
    deadline = time.monotonic() + 240
    while program == "munged" and not (folder / "munge.socket").exists():
        assert time.monotonic() < deadline, (folder / "munged.out").read_text(errors="replace")
        time.sleep(0.05)


def _wait_until_idle(folder: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 240
    shown = ""
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%t %D"], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        shown = done.stdout + done.stderr
        if shown.split() == ["idle", "2"]:
            return
        time.sleep(0.3)
    logs = [file.read_text(errors="replace")[-1500:] for file in folder.glob("*.log")]
    raise TimeoutError("\n".join([shown, *logs]))
