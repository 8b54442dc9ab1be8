"""Builds the environment that Danlu runs and trains in: `python3 -m core.environment.venv ensure|list|clean`.

A virtual environment in the cache (core.environment.venv_cache), filled by pip, linked from `.venv`. Stdlib only: it runs
under the system's Python before anything is installed, and knows nothing of what the packages are for.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

from core.environment import venv_cache
from core.environment.lock import BUILD_TOOLS, read_lock
from core.environment.pip_run import run_pip
from core.environment.venv_versions import is_in_range
from core.errors import DanluError, InputError, MachineError
from core.files import write_json
from core.messages import Message, message

PYTHONS: Final = ((3, 11), (3, 13))
"""From this version on, up to but without that one: the app needs 3.11, xtuner 0.2.0 stops before 3.13."""
_KEPT: Final = ("torch", "torchvision")
_PARENT_FILE: Final = "_danlu_parent.pth"


def ensure(
    requirements: "Sequence[Path]",
    nodeps: "Sequence[Path]",
    *,
    cache: Path,
    link: "Path | None",
    say: "Callable[[Message], None]",
    pip_options: "Sequence[str]" = (),
    or_with: "Path | None" = None,
    is_locked: bool = False,
) -> Path:
    """The finished environment for these requirement files: the one in the cache, or a new one; `link` points to it.

    `nodeps`: files installed with `pip --no-deps`, after the others. `or_with`: a lock whose environment does too, if it is there
    already and no torch is kept (an environment is gigabytes). `is_locked`: `requirements` is that one lock, installed as it stands,
    every file checked against its hash; nothing of the machine is kept. A build that was cut short goes on where it stopped.
    Raises ConflictError if something else lies at `link`, MachineError if this Python does not fit or pip fails.
    """
    require_python(sys.version_info[:2])
    if link is not None:
        venv_cache.require_link_place(link, cache)
    kept = {} if is_locked else kept_packages(requirements)
    versions = " ".join(sorted(f"{n}=={v}" for n, v in kept.items()))
    folder = venv_cache.environment_folder(cache, [*requirements, *nodeps], versions)
    if or_with is not None and or_with.is_file() and not kept:
        larger = venv_cache.environment_folder(cache, [or_with])
        folder = larger if venv_cache.is_whole(larger) else folder
    if not venv_cache.is_whole(folder):
        with venv_cache.locked(folder, is_waiting=False) as is_ours:
            if not is_ours:
                say(message("environment.venv.waiting", path=str(folder)))
        with venv_cache.locked(folder):
            if not venv_cache.is_whole(folder):
                say(message("environment.venv.building", path=str(folder)))
                _build(folder, requirements, nodeps, kept=kept, say=say, pip_options=pip_options, is_locked=is_locked)
    os.utime(folder / venv_cache.MARK)
    if link is not None:
        venv_cache.point(link, folder, cache)
    return folder


def require_python(version: "tuple[int, ...]") -> None:
    """Raises MachineError if XTuner and the app cannot run on this version of Python."""
    if not PYTHONS[0] <= version[:2] < PYTHONS[1]:
        raise MachineError(
            "environment.wrong_python", version=".".join(map(str, version[:2])), executable=sys.executable
        )


def kept_packages(
    requirements: "Sequence[Path]", version_of: "Callable[[str], str | None] | None" = None
) -> "dict[str, str]":
    """Versions of torch (and torchvision) that this interpreter already has, if torch is in the range the files ask for.

    A machine's own torch is built for its driver and is gigabytes to download again, so it is used and pinned. Everything
    else is installed new: only torch's folder is added to the path, behind the environment's own packages.
    """
    version_of = version_of or _installed_version
    torch = version_of("torch")
    lines = [
        line.strip()
        for file in requirements
        if file.is_file()
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    asked = next((line[5:] for line in lines if line.startswith("torch") and line[5:6] in "<>=!~"), None)
    if torch is None or asked is None or not is_in_range(torch, asked.split("#")[0].split(";")[0]):
        return {}
    return {name: version for name in _KEPT if (version := version_of(name))}


def _installed_version(name: str) -> "str | None":
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _build(
    folder: Path,
    requirements: "Sequence[Path]",
    nodeps: "Sequence[Path]",
    *,
    kept: "dict[str, str]",
    say: "Callable[[Message], None]",
    pip_options: "Sequence[str]",
    is_locked: bool,
) -> None:
    tools = _build_tools(requirements) if is_locked else ""
    site = _prepare(folder)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *pip_options]
    if is_locked:
        _install_locked(pip, folder, requirements, tools)
    else:
        if kept:
            say(message("environment.venv.keeping", packages=", ".join(f"{n} {v}" for n, v in kept.items())))
            parent = metadata.distribution("torch").locate_file("")
            (site / _PARENT_FILE).write_text(f"{parent}\n", encoding="utf-8")
        constraints = folder / "danlu-constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()), encoding="utf-8")
        run_pip([*pip, "-c", str(constraints), *_files(requirements)])
        if nodeps:
            run_pip([*pip, "--no-deps", *_files(nodeps)])
    write_json(
        folder / venv_cache.MARK,
        {
            "python": sys.version.split()[0],
            "built_at": time.time(),
            "kept": kept,
            "requirements": [f.name for f in [*requirements, *nodeps]],
        },
    )


def _prepare(folder: Path) -> Path:
    """The site-packages of an environment in `folder` that works: what is there, or a new one."""
    if not _works(folder / "bin" / "python"):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            venv.create(folder, with_pip=True, symlinks=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MachineError("environment.no_venv", path=str(folder), reason=str(error)) from error
    site = next(folder.glob("lib/python*/site-packages"))
    _drop_half_installed(site)
    return site


def _build_tools(locks: "Sequence[Path]") -> str:
    """The part of the locks that other packages are built with. Raises InputError for a lock that is none."""
    return "\n".join(package.text for lock in locks for package in read_lock(lock) if package.name in BUILD_TOOLS)


def _install_locked(pip: "list[str]", folder: Path, locks: "Sequence[Path]", tools: str) -> None:
    """What the locks say and nothing else: what comes as source is built with `tools` of the lock, not with fetched ones."""
    exactly = [*pip, "--require-hashes", "--no-deps"]
    if tools:
        file = folder / "danlu-build-tools.txt"
        file.write_text(f"{tools}\n", encoding="utf-8")
        run_pip([*exactly, *_files([file])])
    run_pip([*exactly, "--no-build-isolation", "--use-pep517", *_files(locks)])


def _files(files: "Sequence[Path]") -> "list[str]":
    return [argument for file in files for argument in ("-r", str(file))]


def _works(python: Path) -> bool:
    """Whether the environment's interpreter starts and has pip: a build may have been killed before that."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def _drop_half_installed(site: Path) -> None:
    """Forget packages whose installation was killed: pip writes RECORD last, and takes METADATA alone for installed."""
    for record in site.glob("*.dist-info"):
        if not (record / "RECORD").is_file():
            shutil.rmtree(record)


def main(argv: "list[str]") -> int:
    parser = argparse.ArgumentParser(prog="python3 -m core.environment.venv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("ensure")
    files = build.add_mutually_exclusive_group(required=True)
    files.add_argument("--requirements", type=Path)
    files.add_argument("--lock", type=Path, help="a lock in place of requirement files")
    build.add_argument("--extra", type=Path, action="append", default=[])
    build.add_argument("--or-with", type=Path, help="a lock whose environment does too, if it is there")
    build.add_argument("--no-deps", type=Path, action="append", default=[], dest="nodeps")
    build.add_argument("--link", type=Path)
    build.add_argument("--pip-option", action="append", default=[])
    build.add_argument("--error-file", type=Path)
    commands.add_parser("list")
    clean = commands.add_parser("clean")
    clean.add_argument("names", nargs="*")
    clean.add_argument("--all", action="store_true", help="all that nothing links to")
    arguments = parser.parse_args(argv)
    if (
        sys.version_info[:2] < PYTHONS[0]
    ):  # The words lie in TOML, which Python reads since 3.11: these cannot come from there.
        print("Danlu 需要 Python 3.11 或 3.12 / needs Python 3.11 or 3.12: make run PYTHON=python3.11", file=sys.stderr)
        return 1
    from core.i18n import catalog, guess_language

    words = catalog(guess_language(os.environ.get("LANG")))

    def say(said: Message) -> None:
        print(words.say(said), flush=True)

    try:
        _run(arguments, say)
    except DanluError as error:
        print("\n".join(words.explain(error)), file=sys.stderr)
        if getattr(arguments, "error_file", None):
            write_json(arguments.error_file, error.to_json())
        return 1
    return 0


def _run(arguments: argparse.Namespace, say: "Callable[[Message], None]") -> None:
    cache = venv_cache.cache_folder()
    if arguments.command == "ensure":
        folder = ensure(
            [arguments.lock] if arguments.lock else [arguments.requirements, *arguments.extra],
            arguments.nodeps,
            cache=cache,
            link=arguments.link,
            say=say,
            pip_options=arguments.pip_option,
            or_with=arguments.or_with,
            is_locked=arguments.lock is not None,
        )
        say(message("environment.venv.ready", path=str(folder)))
        return
    found = venv_cache.list_environments(cache)
    for environment in found:
        state = "in_use" if environment.is_in_use else "unused" if environment.is_whole else "unfinished"
        used = f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(environment.used_at))}"
        size = f"{venv_cache.disk_bytes(environment.path) / 2**30:.2f} GiB"
        say(message(f"environment.venv.{state}", name=environment.name, size=size, used=used))
    if not found:
        say(message("environment.venv.none", path=str(cache)))
    if arguments.command == "clean":
        _clean(
            arguments.names, [item.name for item in found if not item.is_in_use] if arguments.all else [], cache, say
        )


def _clean(names: "list[str]", unused: "list[str]", cache: Path, say: "Callable[[Message], None]") -> None:
    chosen = list(dict.fromkeys([*names, *unused]))
    for name in chosen:
        if Path(name).name != name:
            raise InputError("environment.unknown", name=name, path=str(cache))
        venv_cache.delete_environment(cache, name)
        say(message("environment.venv.deleted", name=name))
    if not chosen:
        say(message("environment.venv.how_to_clean"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
