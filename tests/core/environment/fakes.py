"""Environments with made-up packages: real interpreters, nothing of the training stack."""

import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

TORCH: Final = """
class version: cuda, hip = {cuda!r}, None
class _Properties: total_memory = 80 * 2**30
class cuda:
    is_available = staticmethod(lambda: {available})
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda _i: "Fake H100")
    get_device_capability = staticmethod(lambda _i: (9, 0))
    get_device_properties = staticmethod(lambda _i: _Properties)
    get_arch_list = staticmethod(lambda: ["sm_80", "sm_90a"])
"""
XTUNER: Final = {
    "xtuner/__init__.py": "",
    "xtuner/tools/__init__.py": "",
    "xtuner/model/__init__.py": "class SupervisedFinetune: pass",
}


def make_python(folder: Path, base: str = sys.executable) -> Path:
    """A virtual environment without pip at `folder`; its interpreter."""
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True, timeout=600)
    return folder / "bin/python"


def site_packages(python: Path) -> Path:
    return next(python.parents[1].glob("lib/python*/site-packages"))


def install(python: Path, name: str, version: str, files: dict[str, str] | None = None) -> None:
    """Put a package into an environment: the record pip leaves, and modules with these texts."""
    site = site_packages(python)
    record = site / f"{name}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    for place, text in (files if files is not None else {f"{name}/__init__.py": ""}).items():
        (site / place).parent.mkdir(parents=True, exist_ok=True)
        (site / place).write_text(text, encoding="utf-8")


def script(file: Path, text: str) -> Path:
    """An executable shell script that stands in for a program."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def other_python(name: str) -> str | None:
    """Another version of Python on this machine, if it starts."""
    version = name.removeprefix("python")
    beside = sorted(Path(sys.base_prefix).parent.glob(f"{version}.*/bin/python"))
    for candidate in [name, *map(str, beside)]:
        try:
            found = subprocess.run(
                [candidate, "-c", "import sys; print(sys.executable)"],
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
        except OSError:
            continue
        if path := found.stdout.strip():
            return path
    return None
