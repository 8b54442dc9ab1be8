"""The probe, run inside environments it knows nothing about."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core.environment import probe
from tests.core.environment.fakes import TORCH, XTUNER, install, make_python, other_python, script

PROBE = Path(probe.__file__)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = make_python(tmp_path_factory.mktemp("probe") / "env")
    install(found, "torch", "2.7.1+cu128", {"torch/__init__.py": TORCH.format(cuda="12.8", available=True)})
    install(found, "XTuner", "0.2.0", XTUNER)
    install(found, "deepspeed", "0.19.6", {"deepspeed.py": "raise ImportError('no nvcc\\nfound')"})
    install(found, "flash_attn", "2.7.0", {"flash_attn.py": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"})
    install(found, "slow", "1", {"slow.py": "import time; time.sleep(60)"})
    return found


def facts_of(python: str | Path, folder: Path, **environ: str) -> dict:
    done = subprocess.run(
        [str(python), str(PROBE), str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        timeout=600,
        env=environ,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_facts_of_an_environment(python: Path, tmp_path: Path):
    facts = facts_of(python, tmp_path, PATH="/usr/bin:/bin")
    assert facts["python"]["executable"] == str(python)
    assert facts["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["versions"] == {
        "torch": "2.7.1+cu128",
        "xtuner": "0.2.0",
        "deepspeed": "0.19.6",
        "flash-attn": "2.7.0",
        "slow": "1",
    }
    assert set(facts["imports"]) == {"torch", "xtuner", "deepspeed", "flash_attn"}
    assert facts["imports"]["torch"]["facts"]["devices"][0]["memory_bytes"] == 80 * 2**30
    assert facts["imports"]["xtuner"]["ok"]
    assert facts["imports"]["deepspeed"]["error"] == "found"
    assert facts["imports"]["flash_attn"]["error"].startswith("signal 11")
    assert facts["disk"]["total_bytes"] >= facts["disk"]["free_bytes"] > 0
    assert facts["memory"]["total_bytes"] >= facts["memory"]["available_bytes"] > 0


def test_an_import_that_hangs_is_ended(python: Path):
    result = probe.try_import("slow", limit_seconds=0.5, python=str(python))
    assert result == {"ok": False, "seconds": 0.5, "error": "timeout", "facts": None}


def test_a_module_beside_the_probe_is_not_taken_for_a_package(python: Path, tmp_path: Path):
    """The person's own folder may hold a file of any name."""
    (tmp_path / "json.py").write_text("raise SystemExit('wrong json')", encoding="utf-8")
    (tmp_path / "probe.py").write_bytes(PROBE.read_bytes())
    done = subprocess.run([str(python), "probe.py"], capture_output=True, cwd=tmp_path, timeout=600, check=False)
    assert b"wrong json" in done.stderr  # Python itself put the folder first: this is what the doctor must not do
    assert facts_of(python, tmp_path, PATH="/usr/bin:/bin")["versions"]


@pytest.mark.parametrize("name", ["python3.8", "python3.10", "python3.12"])
def test_old_and_new_pythons(tmp_path: Path, name: str):
    found = other_python(name)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    python = make_python(tmp_path / "env", found)
    install(python, "xtuner", "0.1.17", XTUNER)
    facts = facts_of(python, tmp_path, PATH="/usr/bin:/bin")
    assert facts["python"]["version"].startswith(name.removeprefix("python"))
    assert facts["versions"]["xtuner"] == "0.1.17"
    assert facts["imports"]["xtuner"]["ok"]


def test_driver_and_compilers_come_from_their_programs(python: Path, tmp_path: Path):
    header = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8     |"
    script(tmp_path / "bin/nvidia-smi", f"echo '{header}'")
    script(tmp_path / "bin/nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    script(tmp_path / "bin/g++", "echo 'g++ (Debian) 13.2.0'; echo more")
    facts = facts_of(python, tmp_path, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert facts["driver"] == {"version": "570.86.15", "cuda": "12.8"}
    assert (facts["nvcc"], facts["compiler"]) == ("12.4", "g++ (Debian) 13.2.0")


def test_a_driver_that_fails_is_none(python: Path, tmp_path: Path):
    script(
        tmp_path / "bin/nvidia-smi", "echo 'has failed because it could not communicate with the NVIDIA driver'; exit 9"
    )
    assert facts_of(python, tmp_path, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")["driver"] is None
