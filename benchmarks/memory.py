"""The memory budget against what a GPU takes: peak allocated under XTuner's own runner, stock path, for 20 configurations.

`python -m benchmarks memory`: about three minutes on one H100. Prints the table to stderr and keeps it in docs/memory.md.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
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
_PROCESS_SECONDS: Final = 280
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
    lines = [line for engine in ("amp", "deepspeed") for line in measured([c for c in CASES if c.engine == engine])]
    rows = [row(line) for line in lines]
    text = table(rows, torch.cuda.get_device_name())
    print(text, file=sys.stderr)
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    TABLE.write_text(f"{before}{_BEGIN}\n{text}{_END}{after}", encoding="utf-8")
    return result(rows)


def measured(cases: Sequence[MemoryCase]) -> list[dict[str, Any]]:
    """One line a case, from one process for all of them."""
    argument = json.dumps([asdict(case) for case in cases])
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.training.memory_case", argument],
        cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, "PYTHONPATH": f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    ) as process:  # fmt: skip
        try:
            output = process.communicate(timeout=_PROCESS_SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
    lines = [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]
    if len(lines) < len(cases):
        print(output[-4000:], file=sys.stderr)
    return lines


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
            lines.append(f"| {one['name']} | {one['estimated_bytes'] / 2**20:,.0f} | failed | | | |")
            continue
        share = one["reserved_bytes"] / one["allocated_bytes"]
        sizes = (one["estimated_bytes"], one["allocated_bytes"])
        estimated, found = (f"{size / 2**20:,.0f}" for size in sizes)
        static = f"{one['static_bytes'] / 2**20:,.0f}"
        lines.append(f"| {one['name']} | {estimated} | {found} | {one['error']:+.1%} | {share:.2f} | {static} |")
    return "\n".join(lines) + "\n"
