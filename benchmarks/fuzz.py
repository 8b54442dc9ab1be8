"""Damaged data files through the check and the conversion: none may crash either, none may hang.

The corpus of the tests is cut, spliced, flipped and repeated at random for a minute; what a mutation finds is printed with its seed.
Then libFuzzer (atheris) looks for two minutes, guided by which lines of `core.data` a file reaches.
"""

import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.result import Result

_SECONDS: Final = 60.0
_GUIDED_SECONDS: Final = 120
_SLOWEST_SECONDS: Final = 5.0
_SUFFIXES: Final = (".jsonl", ".json", ".csv", ".txt")
_BYTES: Final = b'{}[]":,\\\n\r\t 0159eE.-\x00\xff\xfe\xef\xbb\xbf\xed\xa0\x80"null"true"role""content""messages""loss"'


def run(seconds: float = _SECONDS) -> Result:
    from core.data.convert import convert
    from core.data.validate import validate
    from core.errors import DanluError
    from core.project import open_project
    from tests.core.data.corpus import CASES

    seeds = [(case.file, case.content) for case in CASES]
    crashes = slow = refused = count = 0
    with tempfile.TemporaryDirectory() as home:
        project = open_project(Path(home))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name, content = damaged(count, seeds)
            file = project.data / f"fuzz{Path(name).suffix}"
            file.write_bytes(content)
            began = time.monotonic()
            try:
                validate(file, workers=1)
                convert(project, file, name="out.jsonl").path.unlink()
            except DanluError:
                refused += 1
            except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
                crashes += 1
                print(f"seed {count}, {name}:\n{traceback.format_exc()}")
            slow += time.monotonic() - began > _SLOWEST_SECONDS
            count += 1
    figures = {"files": count, "refused_with_a_reason": refused, "crashes": crashes, "slower_than_5_seconds": slow}
    figures |= guided(seeds)
    targets = dict.fromkeys(("crashes", "slower_than_5_seconds", "guided_exit_code"), ("==", 0.0))
    return Result(figures, targets | {"guided_files": (">=", 1000.0)})


def guided(seeds: list[tuple[str, bytes]], seconds: int = _GUIDED_SECONDS) -> dict[str, int]:
    """Runs, lines reached and exit code of libFuzzer in a process of its own; it stops at the first crash or hang and prints it."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, (name, content) in enumerate(seeds):
            suffix = Path(name).suffix
            kind = _SUFFIXES.index(suffix) if suffix in _SUFFIXES else 0
            (Path(corpus) / f"{number}").write_bytes(bytes([kind]) + content[: 2**16])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz", corpus, str(seconds)],
            capture_output=True, text=True, errors="replace", timeout=seconds * 3, check=False,
        )  # fmt: skip
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], file=sys.stderr)
    files = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    reached = re.findall(r"cov: (\d+)", done.stderr)
    return {
        "guided_files": int(files.group(1)) if files else 0,
        "guided_coverage": int(reached[-1]) if reached else 0,
        "guided_exit_code": done.returncode,
    }


def _fuzz_guided(corpus: str, seconds: str) -> None:
    """libFuzzer's own loop; the first byte of an input chooses what the file is called. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["core.data"]):
        from core.data.convert import convert
        from core.data.validate import validate
    from core.errors import DanluError
    from core.project import open_project

    home = Path(tempfile.mkdtemp(prefix="danlu_fuzz_"))
    project = open_project(home)

    def try_one(content: bytes) -> None:
        if not content:
            return
        file = project.data / f"fuzz{_SUFFIXES[content[0] % len(_SUFFIXES)]}"
        file.write_bytes(content[1:])
        try:
            validate(file, workers=1)
            convert(project, file, name="out.jsonl").path.unlink()
        except DanluError:
            return

    limits = [
        f"-max_total_time={seconds}",
        "-max_len=65537",
        f"-timeout={_SLOWEST_SECONDS:.0f}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], corpus, f"-artifact_prefix={home}/", *limits], try_one)
    atheris.Fuzz()


def damaged(seed: int, seeds: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """A file of the corpus after one to eight mutations; the same for the same seed."""
    chooser = random.Random(seed)
    name, content = chooser.choice(seeds)
    for _ in range(chooser.randint(1, 8)):
        content = chooser.choice(_MUTATIONS)(content, chooser, chooser.choice(seeds)[1])[: 2**18]
    return name, content


def _flip(content: bytes, chooser: random.Random, _other: bytes) -> bytes:
    at = chooser.randrange(len(content) + 1)
    return content[:at] + bytes([chooser.randrange(256)]) + content[at + 1 :]


def _insert(content: bytes, chooser: random.Random, _other: bytes) -> bytes:
    at, start = chooser.randrange(len(content) + 1), chooser.randrange(len(_BYTES))
    return content[:at] + _BYTES[start : start + chooser.randint(1, 8)] * chooser.choice((1, 1, 1, 500)) + content[at:]


def _cut(content: bytes, chooser: random.Random, _other: bytes) -> bytes:
    start, end = sorted(chooser.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + content[end:]


def _repeat(content: bytes, chooser: random.Random, _other: bytes) -> bytes:
    start, end = sorted(chooser.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:end] * chooser.randint(1, 3) + content[end:]


def _splice(content: bytes, chooser: random.Random, other: bytes) -> bytes:
    return content[: chooser.randrange(len(content) + 1)] + other[chooser.randrange(len(other) + 1) :]


_MUTATIONS: Final[tuple[Callable[[bytes, random.Random, bytes], bytes], ...]] = (_flip, _insert, _cut, _repeat, _splice)


if __name__ == "__main__":
    _fuzz_guided(*sys.argv[1:])
