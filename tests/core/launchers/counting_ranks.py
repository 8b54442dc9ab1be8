"""A trainer for tests on several nodes: gloo ranks that add up ones, and write a line of metrics. `counting_ranks.py RUN_DIR STEPS`."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import distributed


def main(folder: Path, steps: int) -> None:
    distributed.init_process_group("gloo")
    for iteration in range(1, steps + 1):
        total = torch.ones(1)
        distributed.all_reduce(total)
        if distributed.get_rank() == 0:
            line = {"iteration": iteration, "loss": float(total), "tokens": 1, "at": time.time()}
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        time.sleep(0.05)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
