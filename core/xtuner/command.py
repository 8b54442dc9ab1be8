"""The command that trains and the environment it needs. Knows XTuner's traps; starts nothing and imports no XTuner.

Never `xtuner train`: it hides the exit code, takes the PATH's python and leaves its child alive on SIGTERM. Several processes are
started by torchrun; one alone needs none, and starts seconds sooner without.
"""

import os
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

APP_ROOT: Final = Path(__file__).parents[2]
DEEPSPEED_CHOICES: Final = (
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero2_offload",
    "deepspeed_zero3",
    "deepspeed_zero3_offload",
)
"""Names of the DeepSpeed configs that XTuner brings."""
_ENTRY: Final = "core.xtuner.runtime.entry"
_MAX_THREADS: Final = 8
"""Threads a rank on a GPU gets at most: its CPU work is data loading."""


_PORTS: Final = range(15_000, 32_000)
"""Below those that Linux hands out by itself (net.ipv4.ip_local_port_range: 32768 and up)."""


def free_port() -> int:
    """A TCP port that nothing listens on now, and that no connection takes by chance before it is used, seconds later."""
    chance = random.SystemRandom()  # several starts may share a seed
    for _ in range(200):
        with socket.socket() as listener, suppress(OSError):
            port = chance.choice(_PORTS)
            listener.bind(("", port))
            return port
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def training_argv(
    python: str, run_folder: Path, *, world_size: int, port: int, needs_torchrun: bool = False
) -> list[str]:
    """The command that trains in `run_folder`, with `world_size` processes on this machine.

    needs_torchrun: even for one process. XTuner 0.1.x, started without the app's entry, asks for its rank.
    """
    if world_size == 1 and not needs_torchrun:
        return [python, "-m", _ENTRY, str(run_folder)]
    return node_argv(
        python, run_folder, nodes=1, node_rank="0", processes=world_size, address="127.0.0.1", port=str(port)
    )


def node_argv(
    python: str, run_folder: Path, *, nodes: int, node_rank: str, processes: int, address: str, port: str
) -> list[str]:
    """The command of one node of several that train together. `address`: of node 0. Texts, so that a shell's variables may stand there."""
    several = ["--node_rank", node_rank] if nodes > 1 else []
    return [
        python,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        str(nodes),
        *several,
        "--nproc_per_node",
        str(processes),
        "--master_addr",
        address,
        "--master_port",
        port,
        "-m",
        _ENTRY,
        str(run_folder),
    ]


def training_env(
    *, gpus: Sequence[str], world_size: int, is_local: bool, cpu_count: int | None = None
) -> dict[str, str]:
    """What is added to the environment of the trainer.

    gpus: UUIDs or indices, empty for CPU. is_local: model and data lie on this machine, so the hub is never asked.
    """
    cpus = cpu_count or os.cpu_count() or 1
    threads = max(1, cpus // world_size)
    env = {
        "PYTHONPATH": _python_path(),
        # The project's folders (data/, model/, config/) must not pass for Python packages.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        # torch >= 2.6 loads weights only, which a checkpoint of mmengine 0.10 is not.
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        # MKL and libgomp in one process: numpy before torch ends the process without this.
        "MKL_SERVICE_FORCE_INTEL": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(min(threads, _MAX_THREADS) if gpus else threads),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
    }
    if is_local:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if gpus:
        # Less fragmentation: 5 GiB of 56 GiB reserved saved on internlm2-20b. The first name is torch >= 2.9's.
        env |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    else:
        # Threads that spin while they wait take the cores from the others: on a busy machine 2 threads were 6 to 9 times slower.
        env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "1", "OMP_WAIT_POLICY": "passive"}
    return env


def _python_path() -> str:
    """The app's own folder first: the python that trains may be another one than the app's."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(APP_ROOT), given]) if given else str(APP_ROOT)
