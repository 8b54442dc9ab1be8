"""The set of versions known to work together, read from the requirement files. Says nothing of why; requirements*.txt do."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

APP_ROOT: Final = Path(__file__).parents[2]
BASE_FILE: Final = APP_ROOT / "requirements.txt"
NODEPS_FILE: Final = APP_ROOT / "requirements-nodeps.txt"


@dataclass(frozen=True, slots=True)
class KnownGood:
    """One package and the versions of it that are known to work."""

    name: str
    """Normalised: lower case, dashes."""
    specifier: str
    is_without_dependencies: bool
    """Installed with `pip install --no-deps`."""

    def holds(self, version: str) -> bool:
        """Whether `version` is in range; local parts (+cu130) and pre-releases count as their version."""
        try:
            return Requirement(f"x{self.specifier}").specifier.contains(Version(version), prereleases=True)
        except (InvalidVersion, InvalidRequirement):
            return False

    def install_command(self, python: str) -> str:
        """The shell command that brings it into range."""
        flag = "--no-deps " if self.is_without_dependencies else ""
        return f"{python} -m pip install {flag}'{self.name}{self.specifier}'"


def normalise(name: str) -> str:
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def known_good(base: Path = BASE_FILE, nodeps: Path = NODEPS_FILE) -> dict[str, KnownGood]:
    """Every package of the two files by name, in their order."""
    found: dict[str, KnownGood] = {}
    for file, is_nodeps in ((base, False), (nodeps, True)):
        for line in file.read_text(encoding="utf-8").splitlines():
            text = line.split("#")[0].strip()
            if text and not text.startswith("-"):
                requirement = Requirement(text)
                name = normalise(requirement.name)
                found[name] = KnownGood(name, str(requirement.specifier), is_nodeps)
    return found
