"""The memory budget against what a GPU takes: peak allocated under XTuner's own runner, stock path, for 20 configurations.

`python -m benchmarks memory`: a few minutes on one H100. Prints the table to stderr and keeps it in docs/memory.md.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.result import NoGpu, Result
from benchmarks.training.memory_case import MARK, MemoryCase, shape_json
from core.config.memory.budget import make_budget
from core.config.memory.setup import Engine, Setup
from core.config.memory.shape import shape_of

_ROOT: Final = Path(__file__).parents[1]
TABLE: Final = _ROOT / "docs" / "memory.md"
_BEGIN: Final = "<!-- measured: begin -->"
_END: Final = "<!-- measured: end -->"
_CASE_SECONDS: Final = 150
_AT_ONCE: Final = 6
_SPARE_SHARE: Final = 1.2
_SPARE_BYTES: Final = 2 * 2**30
"""What a case may take beyond its estimate, with CUDA's own memory, when cases share the card."""
_ALLOWED: Final = {"lora": 0.03, "qlora": 0.03, "full": 0.05}
_LONG: Final = 4096
CASES: Final = (
    MemoryCase(),
    MemoryCase(batch=4, checkpointing=False),
    MemoryCase(length=_LONG, checkpointing=False),
    MemoryCase(batch=4, length=_LONG),
    MemoryCase(method="qlora"),
    MemoryCase(method="qlora", batch=4, checkpointing=False),
    MemoryCase(method="qlora", batch=4, length=_LONG),
    MemoryCase(shape="7b", method="qlora", length=_LONG),
    MemoryCase(shape="7b", method="qlora", length=_LONG, checkpointing=False),
    MemoryCase(shape="7b", method="qlora", batch=4),
    MemoryCase(shape="7b"),
    MemoryCase(shape="7b", checkpointing=False),
    MemoryCase(shape="7b", batch=4, length=_LONG),
    MemoryCase(method="full", length=_LONG),
    MemoryCase(method="qlora", engine="deepspeed"),
    MemoryCase(method="lora", engine="deepspeed", batch=4, length=_LONG),
    MemoryCase(method="full", engine="deepspeed"),
    MemoryCase(method="full", engine="deepspeed", batch=4, checkpointing=False),
    MemoryCase(method="full", engine="deepspeed", length=_LONG, checkpointing=False),
    MemoryCase(method="full", engine="deepspeed", batch=4, length=_LONG),
)
"""Full fine-tuning of 7B does not fit on one card of 80 GB by any of these ways."""


def run() -> Result:
    """Raises NoGpu without a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpu("needs an NVIDIA GPU")
    lines = measured(CASES, torch.cuda.get_device_properties(0).total_memory)
    rows = [row(line) for line in lines]
    text = table(rows, torch.cuda.get_device_name())
    print(text, file=sys.stderr)
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    TABLE.write_text(f"{before}{_BEGIN}\n{text}{_END}{after}", encoding="utf-8")
    return result(rows)


def measured(cases: Sequence[MemoryCase], card_bytes: int) -> list[dict[str, Any]]:
    """One line a case, each in a process of its own: what DeepSpeed leaves behind is no part of the next.

    Those that the card can hold together run side by side: an allocator's peak is its own process's.
    """
    room = _Room(card_bytes)

    def one(case: MemoryCase) -> dict[str, Any]:
        with room.taken(int(estimate(case) * _SPARE_SHARE) + _SPARE_BYTES):
            return measure_alone(case)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, cases))


class _Room:
    """The card's memory, shared among cases by what they are expected to take."""

    def __init__(self, free_bytes: int) -> None:
        self._free, self._running, self._changed = free_bytes, 0, threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are left, or nothing else runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size or not self._running)
            self._free, self._running = self._free - size, self._running + 1
        try:
            yield
        finally:
            with self._changed:
                self._free, self._running = self._free + size, self._running - 1
                self._changed.notify_all()


def measure_alone(case: MemoryCase) -> dict[str, Any]:
    """The line of one case, or why there is none."""
    argument = json.dumps([asdict(case)])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.training.memory_case", argument],
            cwd=_ROOT, capture_output=True, text=True, errors="replace", check=False, timeout=_CASE_SECONDS,
            env={**os.environ, "PYTHONPATH": f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"case": asdict(case), "failure": f"no end after {_CASE_SECONDS} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    line: dict[str, Any] = (
        json.loads(found[-1].removeprefix(MARK))
        if found
        else {"case": asdict(case), "failure": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    )
    print(f"{case.name}: {json.dumps({key: line[key] for key in line if key != 'case'})}", file=sys.stderr, flush=True)
    return line


def estimate(case: MemoryCase) -> int:
    """Peak bytes of the formula, without any correction."""
    is_engine = case.engine == "deepspeed"
    setup = Setup(
        method=case.method,
        batch_size=case.batch,
        length=case.length,
        accumulation=2,
        is_checkpointing=case.checkpointing,
        engine=Engine(case.engine),
        weights="float32" if case.method == "full" and not is_engine else "bfloat16",
        stage=2 if is_engine else 0,
    )
    return make_budget(shape_of(shape_json(case.shape)), setup).allocated_bytes


def row(line: dict[str, Any]) -> dict[str, Any]:
    """A measured line with its estimate and how far that is off."""
    case = MemoryCase(**line["case"])
    expected = estimate(case)
    found = line.get("allocated_bytes")
    error = expected / found - 1 if found else None
    return {**line, "name": case.name, "method": case.method, "estimated_bytes": expected, "error": error}


def result(rows: Sequence[dict[str, Any]]) -> Result:
    figures: dict[str, float | int | str | None] = {"configurations": sum(row["error"] is not None for row in rows)}
    targets: dict[str, tuple[str, float]] = {"configurations": (">=", 12)}
    for method, allowed in _ALLOWED.items():
        mine = [row for row in rows if row["method"] == method and row["error"] is not None]
        shares = [row["reserved_bytes"] / row["allocated_bytes"] for row in mine]
        figures[f"{method}_largest_error"] = round(max(abs(row["error"]) for row in mine), 4) if mine else None
        targets[f"{method}_largest_error"] = ("<=", allowed)
        figures[f"{method}_reserved_share"] = round(statistics.median(shares), 3) if shares else None
    figures["failed"] = ", ".join(row["name"] for row in rows if row["error"] is None) or None
    return Result(figures, targets)


def table(rows: Sequence[dict[str, Any]], card: str) -> str:
    """The table as Markdown, MiB."""
    how = (
        f"Peak of `torch.cuda.max_memory_allocated` under XTuner's own runner (stock path) on one {card}, MiB. "
        "InternLM2 shapes, random weights, rank 64, dropout 0.1, accumulation 2, sdpa; `kept`: no checkpointing; "
        "deepspeed: XTuner's ZeRO-2 settings. Made by `python -m benchmarks memory`."
    )
    lines = [
        how,
        "",
        "| configuration | estimated | measured | error | reserved / allocated | static, measured |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        if one["error"] is None:
            lines.append(f"| {one['name']} | {one['estimated_bytes'] / 2**20:,.0f} | {_reason(one)} | | | |")
            continue
        share = one["reserved_bytes"] / one["allocated_bytes"]
        sizes = (one["estimated_bytes"], one["allocated_bytes"])
        estimated, found = (f"{size / 2**20:,.0f}" for size in sizes)
        static = f"{one['static_bytes'] / 2**20:,.0f}"
        lines.append(f"| {one['name']} | {estimated} | {found} | {one['error']:+.1%} | {share:.2f} | {static} |")
    return "\n".join(lines) + "\n"


def _reason(line: dict[str, Any]) -> str:
    failure = str(line.get("failure", "failed"))
    return "out of memory" if "OutOfMemory" in failure else failure.replace("|", "/")[:80]
