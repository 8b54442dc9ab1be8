"""A trainer of the standard library for cluster tests: saves when it is asked to, goes on from what it saved.

`python saving_trainer.py RUN_DIR STEPS STEP_SECONDS HOLD_AT`: started for the first time, it does not go beyond step HOLD_AT (0: none)
before it is asked to save. A checkpoint is a copy of RUN_DIR/template.pth, renamed when it is whole.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path


def main(folder: Path, steps: int, step_seconds: float, hold_at: int) -> int:
    resumed = os.environ.get("DANLU_RESUME", "")
    first = int(Path(resumed).stem.removeprefix("iter_")) + 1 if resumed else 1
    is_writer = os.environ.get("SLURM_NODEID", "0") == "0"
    print(f"node {os.environ.get('SLURM_NODEID')} starts at {first}", flush=True)
    for iteration in range(first, steps + 1):
        time.sleep(step_seconds)
        if is_writer:
            write_line(folder, iteration, steps)
        while iteration == hold_at and not resumed and not is_asked(folder):
            time.sleep(step_seconds)
        if is_asked(folder):
            if is_writer:
                save(folder, iteration)
            return 0
    if is_writer:
        save(folder, steps)
    return 0


def is_asked(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("stop.request", "requeue.request"))


def save(folder: Path, iteration: int) -> None:
    partial = folder / f".iter_{iteration}.pth.partial"
    shutil.copyfile(folder / "template.bin", partial)
    partial.replace(folder / f"iter_{iteration}.pth")


def write_line(folder: Path, iteration: int, steps: int) -> None:
    line = {"iteration": iteration, "total_iterations": steps, "loss": 1.0 / iteration, "tokens": 8, "at": time.time()}
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
