"""Training speed with XTuner's own runner, stock against the speed layer, each case in a process of its own; and the same losses.

`python -m benchmarks train` runs every case; `python -m benchmarks.train lora qlora` (or DANLU_BENCH_CASES="lora qlora") some of them.
A case that fails is printed with its last lines, and the rest goes on.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.result import NoGpu, Result
from core.xtuner.command import free_port
from core.xtuner.runtime.speed import parts

_ROOT: Final = Path(__file__).parents[1]
_CASE_SECONDS: Final = 300
_SHOWN_LINES: Final = 30
_PEAK_FLOPS: Final = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16, from NVIDIA's data sheets."""
_SEEING: Final = [
    "fast_pass", "grouped_micro_batches", "selective_recomputation", "norm_kernel", "rotary_kernel", "swiglu_kernel",
    "fused_optimizer",
]  # fmt: skip
"""Every part but the one that keeps packed samples apart: the arithmetic of stock XTuner."""
_STOCK: Final[dict[str, Any]] = {"side": "stock", "windows": 3}
_FAST: Final[dict[str, Any]] = {"side": "fast", "warm_steps": 2, "windows": 3, "window_steps": 2}
_PEER: Final[dict[str, Any]] = {"side": "peer", "windows": 3}
_LONG: Final[dict[str, Any]] = {"shape": "7b", "length": 4096, "accumulation": 8}
_SPEED: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "lora": {"stock": _STOCK, "fast": _FAST},
    "qlora": {"stock": _STOCK | {"method": "qlora"}, "fast": _FAST | {"method": "qlora"}},
    "qlora_8gib": {"fast": _FAST | {"method": "qlora", "memory_limit_gib": 8.0, "warm_steps": 1, "window_steps": 1}},
    "lora_7b": {"stock": _STOCK | _LONG, "fast": _FAST | _LONG | {"warm_steps": 1, "window_steps": 1}},
    "peer": {
        "checkpointing_4": _PEER | {"batch": 4, "accumulation": 4},
        "kept_4": _PEER | {"batch": 4, "accumulation": 4, "checkpointing": False},
        "no_dropout_8": _PEER | {"batch": 8, "accumulation": 2, "checkpointing": False, "dropout": 0.0},
    },
}  # fmt: skip
"""Case → what is run for it; a peer's best counts. Effective batch 16 × 2048 tokens everywhere."""
_PARTS: Final[dict[str, dict[str, Any]]] = {
    f"without_{part}": _FAST | {"parts": [other for other in parts.ALL if other != part]}
    for part in parts.ALL
    if part not in (parts.FAST_PASS, parts.UNPACKED)
}
"""LoRA with one part left out at a time: what each is worth. Not among the cases that run when none is named."""
_LEARNING: Final[dict[str, Any]] = {
    "shape": "0.6b", "length": 1024, "accumulation": 2, "warm_steps": 0, "windows": 200, "keeps_losses": True,
}  # fmt: skip
_EXACT: Final[dict[str, Any]] = _LEARNING | {"precision": "fp32", "windows": 20, "dropout": 0.0}
_LOSS: Final[dict[str, dict[str, Any]]] = {
    "stock_7": _LEARNING | {"side": "stock", "seed": 7},
    "stock_8": _LEARNING | {"side": "stock", "seed": 8},
    "stock_9": _LEARNING | {"side": "stock", "seed": 9},
    "fast": _LEARNING | {"side": "fast", "seed": 7, "parts": _SEEING},
    "fast_apart": _LEARNING | {"side": "fast", "seed": 7},
    "stock_fp32": _EXACT | {"side": "stock", "seed": 7},
    "fast_fp32": _EXACT | {"side": "fast", "seed": 7, "parts": _SEEING},
}
"""Runs of the `loss` case: the same data in the same order."""
_AT_ONCE: Final = 4
CASES: Final = (*_SPEED, "loss", "parts")
_TARGETS: Final[dict[str, dict[str, tuple[str, float]]]] = {
    "lora": {"lora_fast_tokens_per_second": (">=", 40000), "lora_fast_peak_memory_gib": ("<", 60)},
    "qlora": {"qlora_fast_tokens_per_second": (">=", 30000)},
    "qlora_8gib": {
        "qlora_8gib_fast_tokens_per_second": (">=", 14000),
        "qlora_8gib_fast_reserved_memory_gib": ("<=", 8),
    },
    "lora_7b": {"lora_7b_share_of_target": (">=", 1)},
    "peer": {"gain_over_peer": (">=", 1.15)},
    "loss": {"loss_outside_stock_spread": ("<=", 0), "loss_fp32_step_difference": ("<", 1e-3)},
}


def run(chosen: Sequence[str] = ()) -> Result:
    """Run the chosen cases (none: those of DANLU_BENCH_CASES, or all). Raises NoGpu without a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpu("needs an NVIDIA GPU")
    chosen = chosen or os.environ.get("DANLU_BENCH_CASES", "").split() or [name for name in CASES if name != "parts"]
    gpu = torch.cuda.get_device_name()
    figures: dict[str, Any] = {"gpu": gpu}
    lines: list[str] = []
    for name in chosen:
        if name == "loss":
            figures |= learn()
            continue
        for side, changes in (_PARTS if name == "parts" else _SPEED[name]).items():
            result = run_case(f"{name} {side}", changes)
            if result is not None:
                figures |= speed_figures(f"{name}_{side}", result)
                lines.append(table_line(f"{name} {side}", result))
    figures |= compared(figures, _peak(gpu))
    print("\n".join(["", _TABLE_HEAD, *lines, ""]), flush=True)
    # Against the peer the fast side of `lora` is needed too.
    judged = [name for name in chosen if name != "peer" or "lora" in chosen]
    return Result(figures, {key: target for name in judged for key, target in _TARGETS.get(name, {}).items()})


def run_case(name: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """One case in its own process; None if it failed, with its last lines printed."""
    from benchmarks.training.case import MARK, Case

    started = time.perf_counter()
    case = json.dumps(asdict(Case(**changes)))
    environment = {"MASTER_PORT": str(free_port()), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.training.case", case],
            cwd=_ROOT, capture_output=True, text=True, check=False, timeout=_CASE_SECONDS, env=os.environ | environment,
        )  # fmt: skip
        output, code = done.stdout + "\n" + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = f"{_text(error.stdout)}\n{_text(error.stderr)}\nno end after {_CASE_SECONDS} s", None
    found = [line for line in output.splitlines() if line.startswith(MARK)]
    seconds = time.perf_counter() - started
    if not found:
        last = "\n".join(f"  {line}" for line in output.splitlines()[-_SHOWN_LINES:])
        print(f"{name}: failed after {seconds:.0f} s (exit code {code})\n{last}", flush=True)
        return None
    result: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
    shown = {key: value for key, value in result.items() if key not in ("case", "losses", "parts")}
    print(f"{name}: {json.dumps(shown)} in {seconds:.0f} s", flush=True)
    for part in result.get("parts", []):
        print(f"  {'on ' if part['applied'] else 'out'} {part['name']}: {part['note']}", flush=True)
    return result


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def speed_figures(key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{key}_tokens_per_second": round(result["tokens_per_second"]),
        f"{key}_peak_memory_gib": round(result["peak_memory_gib"] or 0, 2),
        f"{key}_reserved_memory_gib": round(result["reserved_memory_gib"] or 0, 2),
    }


_TABLE_HEAD: Final = f"{'case':<24}{'tokens/s':>10}{'windows':>28}{'peak GiB':>10}{'held GiB':>10}"


def table_line(name: str, result: Mapping[str, Any]) -> str:
    windows = " ".join(str(rate) for rate in result["window_tokens_per_second"])
    peak, held = (f"{result[key] or 0:.1f}" for key in ("peak_memory_gib", "reserved_memory_gib"))
    return f"{name:<24}{result['tokens_per_second']:>10,.0f}{windows:>28}{peak:>10}{held:>10}"


def compared(figures: Mapping[str, Any], peak_flops: float | None) -> dict[str, Any]:
    """What follows from the figures of both sides: gains, share of the arithmetic limit, margin over the best peer."""
    rate = {
        key.removesuffix("_tokens_per_second"): value for key, value in figures.items() if key.endswith("_per_second")
    }
    found: dict[str, Any] = {}
    for name in ("lora", "qlora", "lora_7b"):
        if f"{name}_fast" in rate and f"{name}_stock" in rate:
            found[f"{name}_gain"] = round(rate[f"{name}_fast"] / rate[f"{name}_stock"], 2)
        if f"{name}_fast" in rate and peak_flops:
            shape = "7b" if name == "lora_7b" else "1.8b"
            found[f"{name}_mfu"] = round(rate[f"{name}_fast"] * 4 * parameters(shape) / peak_flops, 3)
    if "lora_7b_gain" in found or "lora_7b_mfu" in found:
        shares = (found.get("lora_7b_gain", 0) / 3, found.get("lora_7b_mfu", 0) / 0.45)
        found["lora_7b_share_of_target"] = round(max(shares), 2)
    peers = [value for key, value in rate.items() if key.startswith("peer_")]
    if peers and "lora_fast" in rate:
        found["gain_over_peer"] = round(rate["lora_fast"] / max(peers), 2)
    return found


def parameters(shape: str) -> int:
    """Of InternLM2 in this shape, adapters aside: what 4 N FLOP a token are counted from (forward 2 N, input gradients 2 N)."""
    from benchmarks.training.case import SHAPES

    sizes = SHAPES[shape]
    dim = sizes["hidden"] // sizes["heads"]
    attention = sizes["hidden"] * (2 * sizes["heads"] + 2 * sizes["kv_heads"]) * dim
    layer = attention + 3 * sizes["hidden"] * sizes["width"]
    return sizes["layers"] * layer + 2 * sizes["vocabulary"] * sizes["hidden"]


def learn() -> dict[str, Any]:
    """The same 200 steps: three seeds of stock, and the speed layer with and without samples apart; 20 steps in fp32."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        results = dict(zip(_LOSS, pool.map(lambda name: run_case(f"loss {name}", _LOSS[name]), _LOSS), strict=True))
    losses = {name: result["losses"] for name, result in results.items() if result is not None}
    last = {name: round(statistics.fmean(values[-20:]), 4) for name, values in losses.items()}
    figures: dict[str, Any] = {f"loss_{name}": value for name, value in last.items() if not name.endswith("fp32")}
    stock = [last[name] for name in last if name.startswith("stock_") and not name.endswith("fp32")]
    if stock and "fast" in last:
        outside = max(min(stock) - last["fast"], last["fast"] - max(stock), 0.0)
        figures["loss_outside_stock_spread"] = round(outside, 4)
    if {"stock_fp32", "fast_fp32"} <= losses.keys():
        pairs = zip(losses["stock_fp32"], losses["fast_fp32"], strict=True)
        figures["loss_fp32_step_difference"] = round(max(abs(one - other) for one, other in pairs), 6)
    _keep_curves(losses)
    return figures


def _keep_curves(losses: Mapping[str, Sequence[float]]) -> None:
    """The curves, for the plot in the results page."""
    out = Path(os.environ.get("OUT", _ROOT / "test-artifacts"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "train_losses.json").write_text(json.dumps(losses), encoding="utf-8")
    print(f"losses: {out / 'train_losses.json'}", flush=True)


def _peak(gpu: str) -> float | None:
    return next((flops for name, flops in _PEAK_FLOPS.items() if name in gpu), None)


def main(argv: Sequence[str]) -> int:
    if unknown := set(argv) - set(CASES):
        print(f"unknown case: {', '.join(sorted(unknown))}; there are: {' '.join(CASES)}", file=sys.stderr)
        return 2
    os.environ["DANLU_BENCH_CASES"] = " ".join(argv)
    from benchmarks.__main__ import main as run_benchmarks

    return run_benchmarks(["train"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
