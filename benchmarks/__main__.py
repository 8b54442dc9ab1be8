"""`python -m benchmarks NAME` runs one benchmark and prints one JSON line last; `--list` names them; `--table` rewrites the README's table.

A benchmark is a module in this folder with `run() -> Result`. Peers are measured in the same run, so that figures can be ratios.
"""

import argparse
import importlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.result import NEEDS_GPU, NoGpu, Result, describe_machine

_PACKAGES = (
    "streamlit",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "mmengine",
    "xtuner",
)
_FOLDER = Path(__file__).parent
_RESULTS = _FOLDER.parent / "docs" / "benchmarks.jsonl"
_SKIP = {"__init__", "__main__", "result", "table"}


def names() -> list[str]:
    return sorted(file.stem for file in _FOLDER.glob("*.py") if file.stem not in _SKIP)


def run(name: str, **options: float) -> dict[str, Any]:
    """Run one benchmark and return its line. Raises NoGpu if it needs a GPU and there is none."""
    result: Result = importlib.import_module(f"benchmarks.{name}").run(**options)
    return {
        "name": name,
        "figures": result.figures,
        "targets": {key: f"{comparison} {value}" for key, (comparison, value) in result.targets.items()},
        "ok": result.ok,
        "missed": result.missed,
        "versions": {package: found for package in _PACKAGES if (found := _version(package))},
        "machine": describe_machine(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", help="benchmarks to run")
    parser.add_argument("--list", action="store_true", help="name all benchmarks")
    parser.add_argument(
        "--cpu", action="store_true", help="run all that need no GPU and rewrite the tables in the READMEs"
    )
    parser.add_argument("--minutes", type=float, help="how long `load` presses: a soak, if it is long")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{name}{'  (GPU)' if name in NEEDS_GPU else ''}" for name in names()))
        return 0
    chosen = [name for name in names() if name not in NEEDS_GPU] if arguments.cpu else arguments.name
    unknown = set(chosen) - set(names())
    if unknown or not chosen:
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}" if unknown else "name a benchmark, or --list")
    if arguments.minutes is not None and chosen != ["load"]:
        parser.error("--minutes is for the benchmark `load` alone")
    options = {} if arguments.minutes is None else {"minutes": arguments.minutes}
    lines = []
    for name in chosen:
        try:
            lines.append(run(name, **options))
        except NoGpu as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        print(json.dumps(lines[-1]), flush=True)
    if arguments.cpu:
        from benchmarks.table import write_tables

        write_tables(lines, _RESULTS)
    return 0 if all(line["ok"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
