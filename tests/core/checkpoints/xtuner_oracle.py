"""XTuner's own converters, many in one process: `python xtuner_oracle.py JOBS.json` (its start takes longer than all the work).

The file holds a list of jobs: {"do": "build", config, checkpoint} trains nothing but saves a checkpoint as XTuner's model gives it,
with random values; {"do": "convert", config, checkpoint, target, fp32}; {"do": "merge", base, adapter, target}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from xtuner.registry import BUILDER
from xtuner.tools.model_converters import merge, pth_to_hf

from core.xtuner.runtime.compat import Facts, apply, patch_caches


def build(config: str, checkpoint: str) -> None:
    """What mmengine's CheckpointHook would save, without the optimizer."""
    torch.manual_seed(3)
    loaded = Config.fromfile(config)
    apply(loaded, Facts(is_cpu=True))
    model = BUILDER.build(loaded.model)
    for name, value in model.named_parameters():
        if value.requires_grad:
            noise = torch.randn(value.shape) * 0.1
            value.data = (value.data + noise.abs() if "magnitude" in name or value.dim() == 1 else noise).to(
                value.dtype
            )
    meta = {"iter": 4, "epoch": 0, "cfg": loaded.pretty_text, "seed": 3}
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": meta, "state_dict": model.state_dict()}, checkpoint)


def convert(config: str, checkpoint: str, target: str, fp32: bool) -> None:
    sys.argv = ["pth_to_hf", config, checkpoint, target, "--safe-serialization", *(["--fp32"] if fp32 else [])]
    pth_to_hf.main()


def merge_models(base: str, adapter: str, target: str) -> None:
    sys.argv = ["merge", base, adapter, target, "--safe-serialization", "--device", "cpu"]
    merge.main()


DO = {"build": build, "convert": convert, "merge": merge_models}


def main(jobs: list[dict[str, Any]]) -> None:
    patch_caches()
    torch.set_num_threads(1)
    for job in jobs:
        DO[job.pop("do")](**job)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
