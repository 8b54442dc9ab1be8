"""A trainer for tests on several nodes: gloo ranks that add up ones, and write a line of metrics. `counting_ranks.py RUN_DIR STEPS`.

Every fifth step rank 0 saves a copy of RUN_DIR/template.bin, if there is one; attempt.json says from which to go on.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import distributed


def main(folder: Path, steps: int) -> None:
    attempt = folder / "attempt.json"
    resumed = json.loads(attempt.read_text())["resume"] if attempt.exists() else "iter_0"
    first = int(Path(resumed).stem.removeprefix("iter_")) + 1
    distributed.init_process_group("gloo")
    is_writer = distributed.get_rank() == 0
    for iteration in range(first, steps + 1):
        total = torch.tensor([1.0, (folder / "stop.request").exists() and is_writer])
        distributed.all_reduce(total)
        is_told_to_stop = bool(total[1])
        if is_writer:
            line = {"iteration": iteration, "loss": float(total[0]), "tokens": 1, "at": time.time()}
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            if (is_told_to_stop or iteration % 5 == 0) and (folder / "template.bin").exists():
                save(folder, iteration)
        if is_told_to_stop:
            break
        time.sleep(0.05)
    distributed.destroy_process_group()


def save(folder: Path, iteration: int) -> None:
    """Whole or not there: the node may be cut off meanwhile. All say the same of themselves, so only the newest may stay."""
    partial = folder / f".iter_{iteration}.pth.partial"
    shutil.copyfile(folder / "template.bin", partial)
    old = list(folder.glob("iter_*.pth"))
    partial.replace(folder / f"iter_{iteration}.pth")
    for file in old:
        file.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
