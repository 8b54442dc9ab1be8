"""A trainer of the standard library only: writes metrics, saves on request, misbehaves on demand."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=0.02)
    parser.add_argument("--exit-code", type=int, default=0)
    parser.add_argument("--print", default="", help="text to print before the end")
    parser.add_argument("--hold-at", type=int, default=0, help="do not go beyond this step before a stop is asked for")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--ignore-stop", action="store_true")
    parser.add_argument("--orphan", action="store_true", help="leave a child in its own session behind")
    parser.add_argument("--nan-from", type=int, default=0, help="the loss is NaN from this step on")
    parser.add_argument("--kill-rank", action="store_true", help="start a second rank, and let it die alone")
    parser.add_argument("--kill-self", action="store_true", help="end by SIGKILL, as the OOM killer would do it")
    options = parser.parse_args()
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.orphan:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (options.folder / "orphan.pid").write_text(str(child.pid), encoding="ascii")
    if options.kill_rank:
        rank = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
        code = rank.wait()
        print(f"rank 1 died: exitcode: {code} (signal SIGKILL)", flush=True)
        return 1
    attempt = options.folder / "attempt.json"
    first = json.loads(attempt.read_text(encoding="utf-8"))["iteration"] + 1 if attempt.exists() else 1
    for iteration in range(first, options.steps + 1):
        is_nan = 0 < options.nan_from <= iteration
        step(options.folder, iteration, options.steps, math.nan if is_nan else 3.0 / iteration)
        time.sleep(options.step_seconds)
        while iteration == options.hold_at and not (options.folder / "stop.request").exists():
            time.sleep(options.step_seconds)
        if not options.ignore_stop and (options.folder / "stop.request").exists():
            (options.folder / f"iter_{iteration}.pth").write_bytes(b"saved")
            print(f"saved iter_{iteration}.pth", flush=True)
            return 0
    print(options.print, flush=True)
    if options.kill_self:
        os.kill(os.getpid(), signal.SIGKILL)
    return options.exit_code


def step(folder: Path, iteration: int, total: int, loss: float) -> None:
    line = {
        "iteration": iteration,
        "epoch": 0,
        "total_iterations": total,
        "loss": loss,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "tokens": 128,
        "step_seconds": 0.02,
        "data_seconds": 0.001,
        "memory_bytes": None,
        "at": time.time(),
    }
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    print(f"step {iteration}/{total}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
