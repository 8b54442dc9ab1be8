"""Writes `requirements.lock`: `make lock`, or `python3 -m core.environment.lock_renewal [--upgrade]`.

uv resolves for all machines at once, in an environment of its own that is thrown away; nothing of the training stack is installed.
What is locked already stays where it still fits; `--upgrade` takes the newest version in range of everything. pip's own limits
(its `constraint` option) hold here too, so that what is locked can be installed where it was locked.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from core.environment.lock import of_line, read_lock
from core.environment.pip_run import run_pip
from core.environment.venv import PYTHONS
from core.errors import DanluError, MachineError
from core.files import write_text
from core.i18n import catalog, guess_language

RESOLVER: Final = "uv>=0.8,<1"
RESOLVED: Final = "requirements-dev.txt"
UNRESOLVED: Final = "requirements-nodeps.txt"
LOCK: Final = "requirements.lock"
_HEAD: Final = """\
# Every package that tests and lint need, pinned, with the hashes of its files. Written by `make lock`: do not edit.
# For Linux, Python >={first},<{end}. Installed whole by `make setup-dev`, without asking for dependencies; pip itself comes with
# each environment. torch and what it brings are the index's own builds: where another build is wanted, `make test LOCK=` goes
# by the requirement files, as `make run` always does.
{of}
"""


def renew(root: Path, compile_with: "Callable[[list[str]], None]", *, upgrade: bool = False) -> int:
    """Write the lock of the requirement files in `root`; the number of packages in it.

    `compile_with` runs the resolver with these arguments; the last is the file that it writes.
    """
    files = [root.resolve() / RESOLVED, root.resolve() / UNRESOLVED]
    with tempfile.TemporaryDirectory() as name:
        kept = Path(name, "kept.txt")
        if (root / LOCK).is_file() and not upgrade:
            kept.write_text((root / LOCK).read_text(encoding="utf-8"), encoding="utf-8")
        first, second = (_compile(file, kept, compile_with) for file in files)
        fresh = Path(name, LOCK)
        head = _HEAD.format(first=_dotted(PYTHONS[0]), end=_dotted(PYTHONS[1]), of=of_line(files))
        fresh.write_text(f"{head}{first}\n{second}", encoding="utf-8")
        count = len(read_lock(fresh))
        write_text(root / LOCK, fresh.read_text(encoding="utf-8"))
    return count


def _compile(file: Path, kept: Path, compile_with: "Callable[[list[str]], None]") -> str:
    """One requirement file pinned and hashed. Raises MachineError if its versions do not go together."""
    platforms = f"sys_platform == 'linux' and python_full_version >= '{_dotted(PYTHONS[0])}'"
    kept.with_name("pyproject.toml").write_text(
        f"[tool.uv]\nenvironments = [\"{platforms} and python_full_version < '{_dotted(PYTHONS[1])}'\"]\n",
        encoding="utf-8",
    )
    target = kept.with_name(f"{file.stem}.lock")
    if kept.is_file():
        target.write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["--directory", str(kept.parent), "pip", "compile", "--quiet", "--universal", "--generate-hashes"]
    arguments += ["--python-version", _dotted(PYTHONS[0]), "--no-header", "--no-annotate", "--no-emit-package", "pip"]
    arguments += ["--no-emit-index-url", "--no-emit-find-links", *(["--no-deps"] if file.name == UNRESOLVED else [])]
    compile_with([*arguments, str(file), "--output-file", str(target)])
    return target.read_text(encoding="utf-8")


def _dotted(version: "tuple[int, int]") -> str:
    return ".".join(map(str, version))


def constraint_files(pip: "Sequence[str]") -> "list[str]":
    """The files that pip is told to stay within, by its settings or its environment."""
    said = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False).stdout
    values = [line.partition("=")[2].strip("'\" ") for line in said.splitlines() if ".constraint=" in line]
    return [path for value in values for path in value.split() if Path(path).is_file()]


def _with_uv(folder: Path) -> "Callable[[list[str]], None]":
    """The resolver, installed in `folder`."""
    venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
    run_pip([*pip, "install", "--quiet", RESOLVER])
    limits = [argument for file in constraint_files(pip) for argument in ("--constraints", file)]

    def compile_with(arguments: "list[str]") -> None:
        done = subprocess.run(
            [str(folder / "bin/uv"), *arguments, *limits],
            capture_output=True,
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        )
        if done.returncode:
            raise MachineError("dependencies.cannot_lock", reason=done.stderr.strip())

    return compile_with


def main(argv: "list[str]") -> int:
    parser = argparse.ArgumentParser(prog="python3 -m core.environment.lock_renewal", description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="the newest version in range of everything")
    arguments = parser.parse_args(argv)
    words = catalog(guess_language(os.environ.get("LANG")))
    try:
        with tempfile.TemporaryDirectory() as folder:
            count = renew(Path.cwd(), _with_uv(Path(folder, "resolver")), upgrade=arguments.upgrade)
    except DanluError as error:
        print("\n".join(words.explain(error)), file=sys.stderr)
        return 1
    print(words.text("dependencies.locked", count=count, path=LOCK))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
