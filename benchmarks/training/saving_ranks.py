"""A trainer with the real saving and nothing else: two gloo ranks that count, and save what ZeRO-2 would with `write_together`.

`torchrun … saving_ranks.py RUN_DIR STEPS`. Every number in a checkpoint of iteration N is N, so that a broken one can be told.
Goes on from DANLU_RESUME. Keeps one checkpoint: an older one is removed once the newer has its name. A thread of each rank writes
while the counting goes on; the next save waits for it.
"""

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from core.xtuner.runtime import snapshot
from core.xtuner.runtime.ranks import Ranks, new_group
from core.xtuner.runtime.whole import remove, remove_unfinished, write_together

ELEMENTS = 400_000
_SHAPE = (2, ELEMENTS)


def main(folder: Path, steps: int) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    ranks, pool, writing = Ranks(new_group()), ThreadPoolExecutor(1), Future[None]()
    writing.set_result(None)
    resumed = os.environ.get("DANLU_RESUME")
    first = load(Path(resumed)) + 1 if resumed else 1
    if rank == 0:
        remove_unfinished(folder)
        print(f"begins at {first}", flush=True)
    for iteration in range(first, steps + 1):
        distributed.all_reduce(torch.ones(1))
        if rank == 0:
            line = {"iteration": iteration, "total_iterations": steps, "loss": 1.0, "tokens": 1, "at": time.time()}
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        if iteration % 2 == 0:
            writing.result()
            writing = pool.submit(save, folder, iteration, rank, ranks)
    writing.result()
    distributed.destroy_process_group()


def save(folder: Path, iteration: int, rank: int, ranks: Ranks) -> None:
    target = folder / f"iter_{iteration}.pth"
    partial = folder / f".iter_{iteration}.pth.partial"
    write_together(ranks, partial, target, lambda: write(partial, iteration, rank))
    if rank == 0:
        for old in folder.glob("iter_*.pth"):
            if old != target:
                remove(old)


def write(folder: Path, iteration: int, rank: int) -> None:
    """Rank 0 also writes the model's part, as DeepSpeed does."""
    folder.mkdir(exist_ok=True)
    flat = torch.full((ELEMENTS,), float(iteration))
    inner: dict[str, Any] = {
        "state": {0: {"step": torch.tensor(float(iteration)), "exp_avg": flat}},
        "param_groups": [{"params": [0]}],
    }
    state = {"zero_stage": 2, "single_partition_of_fp32_groups": [flat], "base_optimizer_state": inner}
    snapshot.dump({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if rank == 0:
        model = {
            "module": {"weight": torch.full(_SHAPE, float(iteration))},
            "param_shapes": [{"weight": torch.Size(_SHAPE)}],
            "dp_world_size": distributed.get_world_size(),
            "ds_config": {"zero_optimization": {"stage": 2}},
            "meta": {"iter": iteration},
        }
        snapshot.dump(model, folder / "mp_rank_00_model_states.pt")


def load(checkpoint: Path) -> int:
    """The iteration of a checkpoint. Raises ValueError if any number in it is another one, or a part is missing."""
    iteration = int(checkpoint.stem.removeprefix("iter_"))
    model = torch.load(checkpoint / "mp_rank_00_model_states.pt")
    tensors = [model["module"]["weight"]]
    for rank in range(model["dp_world_size"]):
        state = torch.load(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        tensors += [state["single_partition_of_fp32_groups"][0], state["base_optimizer_state"]["state"][0]["exp_avg"]]
    if not all(bool((tensor == iteration).all()) for tensor in tensors):
        raise ValueError(f"{checkpoint} holds other numbers than {iteration}")
    return iteration


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
