"""Looks at the interpreter that runs it and at its machine: `<python> probe.py` prints one JSON object.

Stdlib only and self-contained, down to Python 3.8: it runs inside environments that Danlu knows nothing about. It states
facts; what they mean is said by core.environment.checks. Each heavy import happens in a process of its own, with a limit.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

IMPORT_SECONDS = 120.0
"""How long one import may take; a cold disk needs tens of seconds for torch."""
IMPORTS = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "mmengine", "xtuner", "flash_attn")
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print("FACTS" + json.dumps({
    "cuda_build": torch.version.cuda,
    "hip_build": getattr(torch.version, "hip", None),
    "cuda_available": cuda,
    "devices": [
        {"name": torch.cuda.get_device_name(i), "capability": list(torch.cuda.get_device_capability(i)),
         "memory_bytes": torch.cuda.get_device_properties(i).total_memory}
        for i in range(torch.cuda.device_count())] if cuda else [],
    "arch_list": torch.cuda.get_arch_list() if cuda else [],
}))
"""
_PROGRAMS = {
    "bitsandbytes": "import bitsandbytes.nn",
    "deepspeed": "import deepspeed, deepspeed.runtime.engine",
    "mmengine": "import mmengine.runner, mmengine._strategy.deepspeed",
    "torch": _TORCH,
    "xtuner": "import importlib.util; assert importlib.util.find_spec('xtuner.tools'); from xtuner.model import SupervisedFinetune",
    "flash_attn": "from flash_attn import flash_attn_func",
}


def versions():
    # type: () -> dict[str, str]
    """Version of every installed distribution, by normalised name; the first on the path counts, as in an import."""
    found = {}  # type: dict[str, str]
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-").replace(".", "-"), distribution.version)
    return found


def try_import(name, limit_seconds=IMPORT_SECONDS, python=sys.executable):
    # type: (str, float, str) -> dict[str, object]
    """Import `name` in a new process: whether it worked, how long it took, and the last line of what went wrong."""
    program = _PROGRAMS.get(name, "import " + name)
    environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", TRANSFORMERS_VERBOSITY="error", DS_LOG_LEVEL="error")
    began = time.monotonic()
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_seconds,
            env=environment,
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "seconds": round(limit_seconds, 2), "error": "timeout", "facts": None}
    seconds = round(time.monotonic() - began, 2)
    output = done.stdout.decode("utf-8", "replace")
    lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    facts = next((json.loads(line[5:]) for line in output.splitlines() if line.startswith("FACTS")), None)
    if done.returncode == 0:
        return {"ok": True, "seconds": seconds, "error": None, "facts": facts}
    error = lines[-1][:600] if lines else ""
    if done.returncode < 0:
        error = f"signal {-done.returncode} {error}".strip()
    return {"ok": False, "seconds": seconds, "error": error, "facts": None}


def driver():
    # type: () -> dict[str, str] | None
    """NVIDIA driver and the newest CUDA it serves, from nvidia-smi; None without one."""
    text = _output(["nvidia-smi"])
    if text is None:
        return None
    found = {}
    for key, mark in (("version", "Driver Version:"), ("cuda", "CUDA Version:")):
        if mark in text:
            found[key] = text.split(mark, 1)[1].split()[0]
    return found or None


def nvcc():
    # type: () -> str | None
    """Version of the CUDA compiler, if there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    text = _output([shutil.which("nvcc") or str(Path(home, "bin", "nvcc")), "--version"])
    return text.split("release", 1)[1].split(",")[0].strip() if text and "release" in text else None


def compiler():
    # type: () -> str | None
    """First line of the C++ compiler's version, if there is one."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        text = _output([name, "--version"]) if name and shutil.which(name) else None
        if text:
            return text.splitlines()[0]
    return None


def memory():
    # type: () -> dict[str, int | None]
    """Total and available RAM in bytes, within the limit of the container if there is a smaller one."""
    values = {}  # type: dict[str, int]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                key, _, rest = line.partition(":")
                values[key] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return {"total_bytes": None, "available_bytes": None}
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        ceiling, usage = _number("/sys/fs/cgroup/" + limit), _number("/sys/fs/cgroup/" + used)
        if ceiling is not None and total is not None and ceiling < total:
            total = ceiling
            available = min(available or ceiling, max(ceiling - (usage or 0), 0))
    return {"total_bytes": total, "available_bytes": available}


def disk(folder):
    # type: (str) -> dict[str, int] | None
    """Total and free bytes of the disk that `folder` lies on."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return {"total_bytes": usage.total, "free_bytes": usage.free}


def probe(folder):
    # type: (str) -> dict[str, object]
    """All facts. `folder`: the project, for its disk."""
    installed = versions()
    with ThreadPoolExecutor(2) as pool:
        names = [name for name in IMPORTS if name.replace("_", "-") in installed]
        imports = dict(zip(names, pool.map(try_import, names)))  # noqa: B905 - strict= came with Python 3.10
    return {
        "schema_version": 1,
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "prefix": sys.prefix,
            "implementation": platform.python_implementation(),
        },
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()),
        },
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": memory(),
        "disk": disk(folder),
        "driver": driver(),
        "nvcc": nvcc(),
        "compiler": compiler(),
        "versions": installed,
        "imports": imports,
        "environment": {
            name: os.environ[name]
            for name in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "PYTHONPATH")
            if name in os.environ
        },
    }


def _output(command):
    # type: (list[str]) -> str | None
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _number(path):
    # type: (str) -> int | None
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    # A folder of the same name as a package must not be imported from here.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(Path.cwd()), here)]
    print(json.dumps(probe(sys.argv[1] if len(sys.argv) > 1 else str(Path.cwd()))))
