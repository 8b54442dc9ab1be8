"""A trainer of the standard library only: writes metrics, saves on request, misbehaves on demand."""

import argparse
import json
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
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--ignore-stop", action="store_true")
    parser.add_argument("--orphan", action="store_true", help="leave a child in its own session behind")
    parser.add_argument("--kill-self", action="store_true", help="end by SIGKILL, as the OOM killer would do it")
    options = parser.parse_args()
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.orphan:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (options.folder / "orphan.pid").write_text(str(child.pid), encoding="ascii")
    for iteration in range(1, options.steps + 1):
        step(options.folder, iteration, options.steps)
        time.sleep(options.step_seconds)
        if not options.ignore_stop and (options.folder / "stop.request").exists():
            (options.folder / f"iter_{iteration}.pth").write_bytes(b"saved")
            print(f"saved iter_{iteration}.pth", flush=True)
            return 0
    print(options.print, flush=True)
    if options.kill_self:
        os.kill(os.getpid(), signal.SIGKILL)
    return options.exit_code


def step(folder: Path, iteration: int, total: int) -> None:
    line = {
        "iteration": iteration,
        "epoch": 0,
        "total_iterations": total,
        "loss": 3.0 / iteration,
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
