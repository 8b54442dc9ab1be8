"""Versions of the training stack, as run.json keeps them."""

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Final

from core.environment.interpreters import installed_versions, python_version

_PACKAGES: Final = (
    "torch",
    "transformers",
    "xtuner",
    "mmengine",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
)


def versions(python: str = sys.executable) -> dict[str, str]:
    """Python and the packages of the training stack that are installed for `python`."""
    if Path(python) != Path(sys.executable):
        installed = installed_versions(Path(python))
        found = {"python": python_version(Path(python)) or "?"}
        return found | {name: installed[name] for name in _PACKAGES if name in installed}
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
