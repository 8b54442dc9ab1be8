"""Measures one setting for a few seconds: `python -m core.xtuner.runtime.trial FOLDER`, FOLDER holding trial.json.

Trains as a run would, with XTuner's runner on the config's own model and data, but saves nothing. Writes result.json. Which
settings are worth measuring is not known here.
"""

import os
import sys
from pathlib import Path
from typing import Any, Final

from core.files import read_json, write_json
from core.xtuner.runtime import compat, entry, failures, startup
from core.xtuner.runtime.speed.parts import Wish

_ROWS: Final = 3000
"""Of each data set: enough to fill the steps, quick to tokenise."""
_ENDLESS: Final = 10**6


def measure(folder: Path, asked: dict[str, Any]) -> None:
    """Train as trial.json in `folder` says until the meter has seen enough."""
    model = Path(asked["model"])
    startup.prefetch(model)
    startup.leave_out(Path(asked["config"]).read_text(encoding="utf-8"), model, has_deepspeed=False)
    startup.import_bitsandbytes()
    import torch
    from mmengine.config import Config
    from mmengine.runner import Runner
    from xtuner.tools.train import register_function

    from core.xtuner.runtime.speed import install

    startup.format_once()
    config = Config.fromfile(asked["config"])
    facts = compat.Facts(
        is_cpu=not torch.cuda.is_available(), model_type=asked.get("model_type", ""), rows=asked.get("rows")
    )
    shorten(config, asked["setting"], folder, asked["seconds"])
    compat.apply(config, facts)
    if asked["setting"]["speed"] != "off":
        install.prepare(config, Wish.from_json(asked["setting"]["speed"]))
    register_function(config._cfg_dict)
    entry.join_group({})
    try:
        Runner.from_cfg(config).train()
    finally:
        entry.leave_group()


def shorten(config: Any, setting: dict[str, Any], folder: Path, seconds: float) -> None:
    """Make the loaded config train with `setting`, without end, saving nothing and answering nothing."""
    from core.xtuner.runtime.speed import install

    config.train_dataloader["batch_size"] = setting["batch_size"]
    config.optim_wrapper["accumulative_counts"] = setting["accumulation"]
    config.model["use_activation_checkpointing"] = setting["checkpointing"]
    for dataset in install.packable_sets(config.train_dataloader.dataset):
        dataset["max_dataset_length"] = min(dataset.get("max_dataset_length") or _ROWS, _ROWS)
    config.train_cfg.pop("max_epochs", None)
    config.train_cfg["max_iters"] = _ENDLESS
    config.param_scheduler = []
    config.visualizer = None
    config.load_from, config.resume = None, False
    config.default_hooks = {"checkpoint": None, "logger": None}
    meter = {"type": "core.xtuner.runtime.meter.MeterHook", "folder": str(folder), "seconds": seconds}
    config.custom_hooks = [{**meter, "accumulation": setting["accumulation"]}]
    config.work_dir, config.launcher = str(folder), "none"
    config.experiment_name = folder.name


def main(argv: list[str]) -> int:
    folder = Path(argv[0])
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    try:
        measure(folder, read_json(folder / "trial.json"))
    except Exception as error:
        explained = failures.explain(error)
        if explained is None:
            raise
        write_json(folder / "error.json", explained.to_json())
        return entry.EXIT_EXPLAINED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
