"""The lock of the packages that tests and lint need: whole, hashed, of the requirement files as they are, and how it is renewed."""

import sys
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core.environment import venv_cache
from core.environment.lock import BUILD_TOOLS, of_line, read_lock, requirement_lines
from core.environment.lock_renewal import LOCK, RESOLVED, UNRESOLVED, constraint_files, renew
from core.errors import InputError
from core.files import read_json

ROOT = Path(__file__).parents[3]
LOCKED = read_lock(ROOT / LOCK)
MACHINES = [
    {
        "python_version": version,
        "python_full_version": f"{version}.9",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    for version, machine in product(("3.11", "3.12"), ("x86_64", "aarch64"))
]


def applies(marker: Marker | None, machine: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(machine)


def is_of(lock: Path, files: list[Path]) -> bool:
    """Whether `lock` was made of what these requirement files ask for now."""
    head = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    return of_line(files) in head


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m['python_version']}-{m['platform_machine']}")
def test_the_lock_holds_every_requirement_at_a_version_that_it_asks_for(machine: dict[str, str]):
    versions = {p.name: p.version for p in LOCKED if not p.marker or applies(Marker(p.marker), machine)}
    assert len(versions) > 100
    asked = [Requirement(line) for line in requirement_lines([ROOT / RESOLVED, ROOT / UNRESOLVED])]
    unmet = [
        f"{requirement}: {versions.get(canonicalize_name(requirement.name))}"
        for requirement in asked
        if applies(requirement.marker, machine)
        and not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]
    assert not unmet
    assert {canonicalize_name(r.name) for r in asked if applies(r.marker, machine)} <= set(versions)


def test_the_lock_is_of_the_requirement_files_as_they_are():
    assert is_of(ROOT / LOCK, [ROOT / RESOLVED, ROOT / UNRESOLVED]), "make lock"


def test_each_package_is_there_once_for_a_machine_and_says_no_place():
    for machine in MACHINES:
        names = [p.name for p in LOCKED if not p.marker or applies(Marker(p.marker), machine)]
        assert len(names) == len(set(names))
    lines = [line.strip() for line in (ROOT / LOCK).read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if line.startswith("-") and not line.startswith("--hash=sha256:")]
    assert not [line for line in lines if "://" in line or " @ " in line]
    assert set(BUILD_TOOLS) <= {p.name for p in LOCKED}
    assert "pip" not in {p.name for p in LOCKED}


def test_the_environment_that_this_runs_in_is_the_locked_one():
    """Where it was built from the lock; `make test LOCK=` takes what the machine has."""
    mark = Path(sys.prefix, venv_cache.MARK)
    built_from = read_json(mark)["requirements"] if mark.is_file() else []
    differing = [
        package.name
        for package in LOCKED
        if built_from == [LOCK] and (not package.marker or Marker(package.marker).evaluate())
        if metadata.version(package.name) != package.version
    ]
    assert not differing


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


HASH = f"--hash=sha256:{'ab' * 32}"


def test_a_lock_is_read_with_markers_hashes_and_its_own_lines(tmp_path: Path):
    lock = write(
        tmp_path,
        "a.lock",
        f"# head\n\none==1.0 ; sys_platform == 'linux' \\\n    {HASH} \\\n    {HASH}\ntwo==2+cpu {HASH}\n",
    )
    one, two = read_lock(lock)
    assert (one.name, one.version, one.marker, len(one.hashes)) == ("one", "1.0", "sys_platform == 'linux'", 2)
    assert one.text == f"one==1.0 ; sys_platform == 'linux' \\\n    {HASH} \\\n    {HASH}"
    assert (two.version, two.marker, two.hashes) == ("2+cpu", "", (HASH.removeprefix("--hash="),))


@pytest.mark.parametrize(
    "line", ["one==1.0", "one>=1.0 " + HASH, "one==1.0 --hash=sha256:abcd", "one @ file:///tmp/one.whl " + HASH]
)
def test_what_is_not_pinned_and_hashed_is_no_lock(tmp_path: Path, line: str):
    with pytest.raises(InputError) as caught:
        read_lock(write(tmp_path, "a.lock", f"{line}\n"))
    assert caught.value.code == "dependencies.not_locked"


def test_what_requirement_files_ask_for(tmp_path: Path):
    write(tmp_path, "base.txt", "# why\none>=1  # note\n\ntwo\n")
    more = write(tmp_path, "more.txt", "-r base.txt\nthree\ntwo\n")
    assert requirement_lines([more]) == ["one>=1", "two", "three"]


class Resolver:
    """Stands in for uv: pins what a file asks for at 1.0, or leaves it as the lock it is given has it."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def __call__(self, arguments: list[str]) -> None:
        file, target = Path(arguments[-3]), Path(arguments[-1])
        self.kept.append(target.read_text(encoding="utf-8") if target.is_file() else "")
        target.write_text("".join(f"{n}==1.0 {HASH}\n" for n in requirement_lines([file])), encoding="utf-8")


def test_a_lock_is_renewed_from_both_files_and_goes_stale_when_they_change(tmp_path: Path):
    files = [write(tmp_path, RESOLVED, "one\n"), write(tmp_path, UNRESOLVED, "alone\n")]
    assert not is_of(tmp_path / LOCK, files)
    assert renew(tmp_path, Resolver()) == 2
    assert [p.name for p in read_lock(tmp_path / LOCK)] == ["one", "alone"]
    assert is_of(tmp_path / LOCK, files)
    write(tmp_path, RESOLVED, "# only a comment more\none\n")
    assert is_of(tmp_path / LOCK, files)
    write(tmp_path, RESOLVED, "one>=1\n")
    assert not is_of(tmp_path / LOCK, files)


def test_what_is_locked_stays_unless_the_newest_is_asked_for(tmp_path: Path):
    write(tmp_path, RESOLVED, "one\n")
    write(tmp_path, UNRESOLVED, "alone\n")
    before = write(tmp_path, LOCK, f"one==0.9 {HASH}\n").read_text(encoding="utf-8")
    renew(tmp_path, resolver := Resolver())
    assert resolver.kept == [before, before]
    renew(tmp_path, resolver := Resolver(), upgrade=True)
    assert resolver.kept == ["", ""]


def test_a_resolver_that_pins_without_a_hash_changes_nothing(tmp_path: Path):
    write(tmp_path, RESOLVED, "one\n")
    write(tmp_path, UNRESOLVED, "alone\n")
    before = write(tmp_path, LOCK, f"one==0.9 {HASH}\n").read_text(encoding="utf-8")
    with pytest.raises(InputError):
        renew(tmp_path, lambda arguments: Path(arguments[-1]).write_text("one==1.0\n", encoding="utf-8") and None)
    assert (tmp_path / LOCK).read_text(encoding="utf-8") == before


def test_the_limits_of_pip_hold_for_the_lock(tmp_path: Path):
    limits = write(tmp_path, "limits.txt", "torch<3\n")
    said = f"global.constraint='{limits} {tmp_path}/gone.txt'\nglobal.timeout='3'\n:env:.constraint='{limits}'\n"
    program = f"print({said!r}, end='')"
    assert constraint_files([sys.executable, "-c", program]) == [str(limits), str(limits)]
