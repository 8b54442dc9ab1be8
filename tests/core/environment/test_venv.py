"""The builder of environments, with packages made here in place of the training stack, and the cache they lie in."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from core.environment import venv, venv_cache
from core.environment.pip_run import run_pip
from core.environment.venv_versions import is_in_range
from core.errors import ConflictError, InputError, MachineError
from core.messages import Message

APP_ROOT = Path(__file__).parents[3]


def wheel(folder: Path, name: str, module: str = "") -> None:
    """The smallest wheel pip takes."""
    folder.mkdir(exist_ok=True)
    record = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": module,
        f"{record}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{record}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        files[f"{record}/RECORD"] = "".join(f"{place},,\n" for place in [*files, f"{record}/RECORD"])
        for place, text in files.items():
            archive.writestr(zipfile.ZipInfo(place), text)  # Without the time of day: the same wheel has the same hash.


def requirements(folder: Path, *lines: str, name: str = "requirements.txt") -> Path:
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def locked(folder: Path, wheels: Path, *names: str) -> Path:
    """A lock of these packages as they lie in `wheels`."""
    digests = {
        name: hashlib.sha256((wheels / f"{name}-1.0-py3-none-any.whl").read_bytes()).hexdigest() for name in names
    }
    return requirements(folder, *(f"{n}==1.0 \\\n    --hash=sha256:{d}" for n, d in digests.items()), name="any.lock")


def options(wheels: Path) -> list[str]:
    return ["--no-index", "--find-links", str(wheels)]


def test_environment_is_built_once_goes_on_after_a_failure_and_appears_whole(tmp_path: Path):
    wheels, link, said = tmp_path / "wheels", tmp_path / "project/env", []
    wheel(wheels, "first")
    files, cache = [requirements(tmp_path, "first", "second")], tmp_path / "cache"

    def build() -> Path:
        return venv.ensure(files, [], cache=cache, link=link, say=said.append, pip_options=options(wheels))

    with pytest.raises(MachineError) as caught:
        build()
    assert caught.value.code == "environment.pip_failed"
    assert "second" in caught.value.params["reason"]
    assert not link.exists()
    [half] = venv_cache.list_environments(cache)
    assert not half.is_whole
    stamp = (half.path / "pyvenv.cfg").stat().st_mtime_ns
    wheel(wheels, "second")
    folder = build()
    assert folder == half.path
    assert (folder / "pyvenv.cfg").stat().st_mtime_ns == stamp  # The same environment went on.
    assert link.resolve() == folder
    subprocess.run([link / "bin/python", "-c", "import first, second"], check=True, timeout=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(venv, "_build", None)  # It is not asked for.
        build()
    [whole] = venv_cache.list_environments(cache)
    assert (whole.is_whole, whole.is_in_use, whole.links) == (True, True, (link,))
    with pytest.raises(ConflictError):
        venv_cache.delete_environment(cache, whole.name)
    link.unlink()
    venv_cache.delete_environment(cache, whole.name)
    assert list(cache.iterdir()) == []


def test_a_lock_takes_no_other_file_than_it_names_and_its_environment_is_used_where_it_is_there(tmp_path: Path):
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheel(wheels, "first")
    wheel(wheels, "tools")
    base, lock = requirements(tmp_path, "first"), locked(tmp_path, wheels, "first", "tools")

    def build(file: Path, *, or_with: Path | None = None, is_locked: bool = False) -> Path:
        return venv.ensure(
            [file],
            [],
            cache=cache,
            link=None,
            say=lambda _: None,
            pip_options=options(wheels),
            or_with=or_with,
            is_locked=is_locked,
        )

    wheel(wheels, "tools", "print('somebody else')\n")
    with pytest.raises(MachineError) as caught:
        build(lock, is_locked=True)
    assert "DO NOT MATCH THE HASHES" in caught.value.params["reason"]
    small = build(base, or_with=lock)  # What is not whole is not used.
    assert build(base, or_with=tmp_path / "none.lock") == small
    wheel(wheels, "tools")
    large = build(lock, is_locked=True)
    assert large != small
    subprocess.run([large / "bin/python", "-c", "import first, tools"], check=True, timeout=600)
    assert build(base, or_with=lock) == large
    assert build(base) == small


def test_a_lock_with_a_package_that_nobody_hashed_is_refused_before_anything_is_made(tmp_path: Path):
    lock = requirements(tmp_path, "first==1.0", name="any.lock")
    with pytest.raises(InputError) as caught:
        venv.ensure([lock], [], cache=tmp_path / "cache", link=None, say=lambda _: None, is_locked=True)
    assert (caught.value.code, caught.value.params["line"]) == ("dependencies.not_locked", "first==1.0")
    assert venv_cache.list_environments(tmp_path / "cache") == []


WAITING_BUILD = """
import sys, threading
from pathlib import Path
from core.environment import venv

def wait_to_be_killed(command):
    Path(sys.argv[1]).touch()
    threading.Event().wait()

venv.run_pip = wait_to_be_killed
sys.exit(venv.main(sys.argv[2:]))
"""
"""A build that has made its environment, and then comes no further than pip."""


def test_killed_build_locks_nobody_out_and_goes_on(tmp_path: Path):
    """SIGKILL while the environment is being made: what is there does not look whole, and the next build finishes it."""
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheel(wheels, "first")
    file = requirements(tmp_path, "first")
    order = ["ensure", "--requirements", str(file), "--link", str(tmp_path / "env")]
    order += [f"--pip-option={option}" for option in options(wheels)]
    command = [sys.executable, "-m", "core.environment.venv", *order]
    environment = {**os.environ, "DANLU_CACHE": str(cache)}
    at_pip = tmp_path / "at_pip"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_BUILD, str(at_pip), *order], cwd=APP_ROOT, env=environment,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not at_pip.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    [half] = venv_cache.list_environments(cache)
    assert not half.is_whole
    assert not (tmp_path / "env").exists()
    done = subprocess.run(command, cwd=APP_ROOT, env=environment, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "env").resolve() == half.path
    subprocess.run([tmp_path / "env/bin/python", "-c", "import first"], check=True, timeout=600)


def fake_environment(cache: Path, name: str, *, is_whole: bool = True) -> Path:
    folder = cache / name
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").write_text("", encoding="ascii")
    if is_whole:
        (folder / venv_cache.MARK).write_text("{}", encoding="ascii")
    return folder


def test_key_changes_with_contents_names_and_what_is_kept(tmp_path: Path):
    file = requirements(tmp_path, "a==1")
    first = venv_cache.environment_folder(tmp_path, [file])
    assert first == venv_cache.environment_folder(tmp_path, [file])
    assert first != venv_cache.environment_folder(tmp_path, [file], "torch==2.7")
    requirements(tmp_path, "a==2")
    assert first != venv_cache.environment_folder(tmp_path, [file])
    with pytest.raises(InputError) as caught:
        venv_cache.environment_folder(tmp_path, [tmp_path / "gone.txt"])
    assert caught.value.code == "environment.no_requirements"


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"DANLU_CACHE": "/c"}, "/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/danlu"),
        ({"DANLU_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
    ],
)
def test_place_of_the_cache(environ: dict[str, str], place: str):
    assert venv_cache.cache_folder(environ) == Path(place)


def test_nothing_but_a_link_of_ours_is_replaced(tmp_path: Path):
    cache = tmp_path / "cache"
    one, two = fake_environment(cache, "env-3.11-one"), fake_environment(cache, "env-3.11-two")
    link = tmp_path / "env"
    venv_cache.point(link, one, cache)
    venv_cache.point(link, two, cache)
    assert link.resolve() == two
    link.unlink()
    link.symlink_to(tmp_path / "dead")
    venv_cache.point(link, one, cache)
    link.unlink()
    for make, code in ((lambda: link.symlink_to(tmp_path), "foreign_link"), (link.mkdir, "real_folder")):
        make()
        with pytest.raises(ConflictError) as caught:
            venv_cache.point(link, one, cache)
        assert caught.value.code == f"environment.{code}"
        link.unlink() if link.is_symlink() else link.rmdir()


def test_a_locked_environment_is_not_deleted(tmp_path: Path):
    folder = fake_environment(tmp_path, "env-3.11-a", is_whole=False)
    with venv_cache.locked(folder) as is_ours, venv_cache.locked(folder, is_waiting=False) as is_theirs:
        assert (is_ours, is_theirs) == (True, False)
        with pytest.raises(ConflictError):
            venv_cache.delete_environment(tmp_path, folder.name)
    venv_cache.delete_environment(tmp_path, folder.name)
    assert not folder.exists()
    with pytest.raises(InputError):
        venv_cache.delete_environment(tmp_path, "env-3.11-a")


def test_size_counts_hard_links_once_and_follows_no_link(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(b"x" * 100_000)
    alone = venv_cache.disk_bytes(tmp_path / "a")
    os.link(tmp_path / "a/file", tmp_path / "a/again")
    (tmp_path / "a/link").symlink_to("/usr")
    assert alone <= venv_cache.disk_bytes(tmp_path / "a") < alone + 10_000


def test_command_line_lists_and_cleans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path))
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    fake_environment(tmp_path, "env-3.11-a")
    assert venv.main(["list"]) == 0
    assert "env-3.11-a" in capsys.readouterr().out
    assert venv.main(["clean", "../other"]) == 1
    assert venv.main(["clean", "--all"]) == 0
    assert not (tmp_path / "env-3.11-a").exists()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk_full"),
        ("WARNING: Retrying ... NewConnectionError('<pip...>: Failed to establish')", "no_network"),
        ("ERROR: ResolutionImpossible", "pip_failed"),
    ],
)
def test_what_pip_says_becomes_a_reason(text: str, code: str):
    program = "import sys; print(sys.argv[1]); sys.exit(1)"
    with pytest.raises(MachineError) as caught:
        run_pip([sys.executable, "-c", program, text])
    assert caught.value.code == f"environment.{code}"


def test_torch_of_the_machine_is_kept_if_it_fits(tmp_path: Path):
    file = requirements(tmp_path, "streamlit", "torch>=2.6,<2.15  # why")
    found = {"torch": "2.7.1+cu128", "torchvision": "0.22.1"}
    assert venv.kept_packages([file], found.get) == found
    assert venv.kept_packages([file], {"torch": "2.5.1"}.get) == {}
    assert venv.kept_packages([requirements(tmp_path, "torchvision", name="b.txt")], found.get) == {}


@pytest.mark.parametrize(
    ("version", "clauses", "expected"),
    [
        ("2.6", ">=2.6,<2.15", True),
        ("2.6.0", "==2.6", True),
        ("2.14.1+cu130", ">=2.6,<2.15", True),
        ("2.15.0", ">=2.6,<2.15", False),
        ("2.7.0rc1", ">=2.6", False),
        ("4.55.4", "==4.55.*", True),
        ("1.4.5", "~=1.4.2", True),
        ("1.5", "~=1.4.2", False),
        ("2.6", "!=2.6", False),
        ("2.6", "@ file:///x", False),
    ],
)
def test_ranges(version: str, clauses: str, expected: bool):
    assert is_in_range(version, clauses) is expected


def test_ranges_agree_with_packaging():
    from packaging.specifiers import SpecifierSet

    versions = ["1", "1.0.1", "1.4.2", "1.10", "2.0", "2.6.1", "2.14"]
    for clauses in (">=1.4", "<2", ">=1.4.2,<2.6", "==2.0", "!=1.10", "~=1.4", "<=2.6.1", ">1.0.1"):
        for version in versions:
            assert is_in_range(version, clauses) == SpecifierSet(clauses).contains(version), (version, clauses)


def test_a_python_that_does_not_fit_is_refused():
    for version in ((3, 10), (3, 13)):
        with pytest.raises(MachineError) as caught:
            venv.require_python(version)
        assert caught.value.code == "environment.wrong_python"
    venv.require_python((3, 12, 4))
    assert Message("environment.venv.none", {}).key
