"""Whether locked packages have known vulnerabilities: `python -m core.environment.vulnerabilities requirements.lock`, part of `make lint`.

pip-audit asks OSV, one question a package; nothing is installed. A finding fails, unless [tool.danlu.vulnerabilities] of pyproject.toml
gives its id and the reason why it does not matter here. Where the service cannot be reached, one line says so and nothing fails.
PyPI's own service is not asked: a mirror that has none answers "not found" for everything, which reads like "nothing found".
"""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.environment.lock import read_lock
from core.errors import DanluError, InputError, MachineError
from core.i18n import Catalog, catalog, guess_language
from core.messages import Message, message

_TIMEOUT_S: Final = 15
_UNREACHABLE_SIGNS: Final = (
    "NameResolutionError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "SSLError",
    "ConnectionError",
    "ServiceError",
    "JSONDecodeError",
)
"""In what pip-audit says when nobody answers, or something that is not the service: most telling first."""
_TAIL_LINES: Final = 12


class Unreachable(Exception):
    """The service gave no answer; the text says what was met instead."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One known vulnerability of one locked package."""

    name: str
    version: str
    ids: frozenset[str]
    """Its id and every other name it goes by."""
    fixed_in: tuple[str, ...]
    text: str

    @property
    def id(self) -> str:
        """The name it is best known by."""
        return min(self.ids, key=lambda one: (not one.startswith("CVE-"), not one.startswith("GHSA-"), one))


@dataclass(frozen=True, slots=True)
class Audit:
    """What the service said."""

    checked: int
    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]
    """Packages that the service could not say anything of."""


def read_answer(text: str) -> Audit:
    """An audit from what pip-audit prints as JSON."""
    packages = json.loads(text)["dependencies"]
    skipped = tuple(package["name"] for package in packages if "skip_reason" in package)
    return Audit(len(packages) - len(skipped), tuple(_findings(packages)), skipped)


def _findings(packages: list[dict[str, Any]]) -> Iterator[Finding]:
    for package in packages:
        for found in package.get("vulns", []):
            ids = frozenset([found["id"], *found["aliases"]])
            summary = " ".join(found["description"].split())
            yield Finding(package["name"], package["version"], ids, tuple(found["fix_versions"]), summary)


def ask(lock: Path, service: str | None = None) -> Audit:
    """Ask the service (None: OSV's own) about every package of the lock.

    Raises Unreachable if nobody answers, MachineError if pip-audit fails otherwise.
    """
    read_lock(lock)
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--timeout", str(_TIMEOUT_S)]
    command += ["--format", "json", "--progress-spinner", "off", *(["--osv-url", service] if service else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.lstrip().startswith("{"):
        return read_answer(done.stdout)
    if met := next((sign for sign in _UNREACHABLE_SIGNS if sign in done.stderr), None):
        raise Unreachable(met)
    said = done.stderr.strip().splitlines()[-_TAIL_LINES:]
    raise MachineError("dependencies.audit_failed", code=done.returncode, reason="\n".join(said))


def read_ignored(project: Path) -> dict[str, str]:
    """Ids that do not count, with the reason. Raises InputError where the reason is missing: it is what a reader needs."""
    table = (
        tomllib.loads(project.read_text(encoding="utf-8")).get("tool", {}).get("danlu", {}).get("vulnerabilities", {})
    )
    for one, reason in table.items():
        if not isinstance(reason, str) or not reason.strip():
            raise InputError("dependencies.no_reason", id=one, path=str(project))
    return dict(table)


def report(audit: Audit, ignored: Mapping[str, str]) -> tuple[list[Message], int]:
    """What to tell a person, and how many findings count."""
    said, counting, met = [], 0, set()
    for found in audit.findings:
        reasons = [one for one in ignored if one in found.ids]
        met.update(reasons)
        place = {"name": found.name, "version": found.version, "id": found.id}
        if reasons:
            said.append(message("dependencies.audit.ignored", **place, reason=ignored[reasons[0]]))
            continue
        counting += 1
        said.append(message("dependencies.audit.found", **place, fix=_fix(found), text=found.text))
    said += [message("dependencies.audit.unneeded", id=one) for one in ignored if one not in met]
    if audit.skipped:
        said.append(message("dependencies.audit.skipped", names=", ".join(audit.skipped)))
    if not audit.findings:
        said.append(message("dependencies.audit.clean", count=audit.checked))
    return said, counting


def _fix(found: Finding) -> Message:
    if not found.fixed_in:
        return message("dependencies.audit.not_fixed")
    return message("dependencies.audit.fixed_in", versions=", ".join(found.fixed_in))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.environment.vulnerabilities", description=__doc__)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--project", type=Path, default=Path("pyproject.toml"), help="where the ignored ids are")
    parser.add_argument("--service", help="another place that answers as OSV does")
    arguments = parser.parse_args(argv)
    words = catalog(guess_language(os.environ.get("LANG")))
    try:
        return _tell(arguments, words)
    except Unreachable as met:
        print(words.text("dependencies.audit.unreachable", reason=str(met)))
        return 0
    except DanluError as error:
        print("\n".join(words.explain(error)), file=sys.stderr)
        return 1


def _tell(arguments: argparse.Namespace, words: Catalog) -> int:
    ignored = read_ignored(arguments.project)
    said, counting = report(ask(arguments.lock, arguments.service), ignored)
    for sentence in said:
        print(words.say(sentence))
    if counting:
        raise InputError("dependencies.vulnerable", count=counting)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
