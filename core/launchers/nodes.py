"""Several machines without a scheduler: the command for each node, and what each has said of itself.

Node 0 is the machine of the app, where the run is supervised; a person pastes one command on each other node. Every node runs
`core.launchers.node`, which joins node 0, proves that the folder is shared and the packages agree, then starts torchrun.
"""

import shlex
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from core.errors import DanluError, InputError
from core.files import read_json
from core.runs.directory import RunDirectory, RunSpec
from core.xtuner.command import training_env

NODES_FOLDER: Final = "nodes"
"""In the run's folder: `<rank>.json`, written by each node."""
_MAX_NODES: Final = 64
COMPARED: Final = ("python", "torch", "transformers", "xtuner", "mmengine", "peft", "deepspeed", "bitsandbytes")
"""Versions that must be the same on all nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesWish:
    """What a person wants of several machines. `address`: of node 0, as the other nodes reach it."""

    address: str
    port: int = 29500
    """torchrun's; the next one carries the nodes' own signs of life."""
    nodes: int = 2
    processes: int = 1
    """On each node, one for each GPU."""
    has_gpus: bool = True
    interface: str = ""
    """Network interface for the collectives; empty: chosen by NCCL or gloo."""

    def __post_init__(self) -> None:
        if not 2 <= self.nodes <= _MAX_NODES or self.processes < 1:
            raise InputError("nodes.bad_count", nodes=self.nodes, most=_MAX_NODES)
        if not self.address.strip() or any(sign in self.address for sign in " ;&|$`'\"\n"):
            raise InputError("nodes.bad_address", address=self.address)

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{key: value[key] for key in cls.__dataclass_fields__ if key in value})


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node last said."""

    rank: int
    host: str
    state: str
    """`joining`, `ready`, `running`, `ended`, `lost`"""
    versions: dict[str, str]
    at: float
    exit_code: int | None = None


def node_env(wish: NodesWish, *, is_local: bool) -> dict[str, str]:
    """What is added to the environment of every node. Each uses its own first GPUs."""
    gpus = [str(number) for number in range(wish.processes)] if wish.has_gpus else []
    env = training_env(gpus=gpus, world_size=wish.processes, is_local=is_local)
    if wish.interface:
        env |= {"NCCL_SOCKET_IFNAME": wish.interface, "GLOO_SOCKET_IFNAME": wish.interface}
    return env


def default_address() -> str:
    """The address with which this machine reaches others; its name if it reaches none. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: never a real machine; UDP only looks for the way.
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def local_argv(python: str, run_folder: Path) -> list[str]:
    """The command of node 0."""
    return [python, "-m", "core.launchers.node", str(run_folder), "0"]


def paste_command(spec: RunSpec, run_folder: Path, rank: int) -> str:
    """What to paste on node `rank`: the same interpreter, folder and environment as on node 0."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())]
    argv = [spec.argv[0], "-m", "core.launchers.node", str(run_folder), str(rank)]
    return "\n".join([f"cd {shlex.quote(spec.cwd)}", *lines, shlex.join(argv)])


def read_nodes(run: RunDirectory) -> list[NodeReport]:
    """What every node has said so far, by rank."""
    found = []
    for file in sorted((run.path / NODES_FOLDER).glob("*.json")):
        try:
            value = read_json(file)
            found.append(NodeReport(**{key: value[key] for key in NodeReport.__dataclass_fields__ if key in value}))
        except (DanluError, TypeError):
            continue
    return sorted(found, key=lambda report: report.rank)


def differing_versions(reports: list[NodeReport]) -> list[str]:
    """Packages whose versions are not the same everywhere, as `torch: 2.9.0 (a) ≠ 2.8.0 (b)`."""
    found = []
    for name in COMPARED:
        versions = {report.versions.get(name, "–") for report in reports}
        if len(versions) > 1:
            found.append(f"{name}: " + " ≠ ".join(f"{r.versions.get(name, '–')} ({r.host})" for r in reports))
    return found
