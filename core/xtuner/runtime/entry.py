"""One process of the trainer: `python -m core.xtuner.runtime.entry RUN_DIR`, where there are several through torchrun.

Loads the run's own copy of the config, puts the app's hooks and patches in, and lets XTuner train. Exit codes: 0 trained or
stopped on request, 3 an explained error (error.json), anything else a defect with its traceback in the log.
"""

from core.runs.startup import clock  # isort: skip # first: it measures the other imports

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from core.checkpoints.weights import open_checkpoint
from core.config import deepspeed
from core.errors import DanluError
from core.files import write_json
from core.i18n import catalog
from core.launchers.slurm import RESUME_VARIABLE
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.state import read_attempt
from core.xtuner.command import free_port
from core.xtuner.runtime import compat, failures, startup, tokenised, tokenising

_HOOKS: Final = "core.xtuner.runtime"
EXIT_EXPLAINED: Final = 3


def main(argv: list[str]) -> int:
    run = RunDirectory(Path(argv[0]))
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        train(run)
    except tokenising.Stopped:
        _say("stopped before the first step; there is nothing to save")
        return 0
    except Exception as error:
        explained = error if isinstance(error, DanluError) else failures.explain(error)
        if explained is None:
            raise
        if not isinstance(error, DanluError):
            failures.print_traceback(error)
        what, next_step = catalog("en").explain(explained)
        print(f"{explained.code}: {what} {next_step}", file=sys.stderr, flush=True)
        if is_main or not run.error_file.exists():
            write_json(run.error_file, explained.to_json())
        return EXIT_EXPLAINED
    finally:
        leave_group()
    return 0


def train(run: RunDirectory) -> None:
    """Train as run.json says, in this process. Raises whatever XTuner raises."""
    details = run.spec().details
    source = run.source / f"{details['config']['name']}.py"
    model = Path(details["base_model"]["path"])
    startup.prefetch(model)
    startup.leave_out(source.read_text(encoding="utf-8"), model, has_deepspeed=bool(details.get("deepspeed")))
    stand_alone()
    startup.import_bitsandbytes()
    from mmengine.config import Config
    from xtuner.tools import train as xtuner_train

    clock.until("imports")
    startup.format_once()
    config = Config.fromfile(str(source))
    if details.get("method") != "qlora":  # 4-bit weights are packed on the GPU as they come: one file after another
        os.environ.setdefault("HF_ENABLE_PARALLEL_LOADING", "true")
    prepare(config, run, details)
    join_group(details)
    clock.until("config")
    sys.argv = _xtuner_argv(run, details)
    # XTuner reads the config from its path; it must get the prepared one.
    xtuner_train.Config = _Prepared(config)
    xtuner_train.main()


def prepare(config: Any, run: RunDirectory, details: dict[str, Any]) -> None:
    """Put patches, hooks and the speed layer into the loaded config."""
    import torch

    facts = compat.Facts(
        is_cpu=not torch.cuda.is_available(),
        world_size=details["world_size"],
        deepspeed=details.get("deepspeed"),
        model_type=details["base_model"].get("model_type", ""),
        rows=sum(data["rows"] for data in details["data"])
        if all(data.get("rows") for data in details["data"])
        else None,
    )
    for patch in compat.apply(config, facts):
        _say(f"patch {patch.name} ({patch.versions}): {patch.reason}")
    insert_hooks(config, run)
    startup.measure(config, run.path)
    if config.get("visualizer"):
        from core.xtuner.runtime import trackers

        trackers.name_run(config, run.id)
    if details.get("speed") not in (None, "off"):
        _speed_up(config, details)
    # Last: what the data set is made with is part of its name.
    _tokenise(config, run, details)


def _tokenise(config: Any, run: RunDirectory, details: dict[str, Any]) -> None:
    """Once for all ranks, before they meet. XTuner gives a resumed run the seed of its checkpoint."""
    resume = resume_from(run, details)
    seed = open_checkpoint(Path(resume)).meta.get("seed") if resume else details.get("seed")
    folder = Project(Path(run.spec().cwd)).private / "tokenised"
    datasets = tokenised.use_cache(config, details | {"seed": seed}, folder)
    rank, world_size = int(os.environ.get("RANK", "0")), int(details["world_size"])
    with clock.span("data"):
        tokenising.make_ready(datasets, run, rank=rank, world_size=world_size, seed=int(seed or 0))


def insert_hooks(config: Any, run: RunDirectory) -> None:
    """Our hooks in place of XTuner's chat evaluation and mmengine's checkpoint hook, and up to four of our own."""
    folder = str(run.path)
    if config.get("custom_hooks") is None:
        config.custom_hooks = []
    for hook in config.custom_hooks:
        if compat.type_name(hook["type"]) == "EvaluateChatHook" and not hook.get("evaluation_images"):
            hook["type"], hook["run"] = f"{_HOOKS}.samples.SampleHook", folder
    accumulation = int(config.optim_wrapper.get("accumulative_counts", 1))
    config.custom_hooks.append({"type": f"{_HOOKS}.hooks.LiveHook", "run": folder})
    config.custom_hooks.append({"type": f"{_HOOKS}.hooks.StopHook", "run": folder, "accumulation": accumulation})
    config.custom_hooks.append({"type": f"{_HOOKS}.resumed.NumberHook"})
    validation = config.get("validation")
    if validation and validation["dataset"]["dataset"].get("data_files"):
        options = {"type": f"{_HOOKS}.validation.ValidationHook", "run": folder}
        batch_size = int(config.train_dataloader.get("batch_size", 1))
        config.custom_hooks.append({**validation, **options, "batch_size": batch_size})
    if config.get("default_hooks") is None:
        config.default_hooks = {}
    checkpoint = config.default_hooks.setdefault("checkpoint", {"by_epoch": False, "interval": 500})
    checkpoint["type"] = f"{_HOOKS}.checkpoint.WholeCheckpointHook"


class _Prepared:
    """Stands in for mmengine's Config where XTuner loads the file."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def fromfile(self, _path: str) -> Any:
        return self._config


def _speed_up(config: Any, details: dict[str, Any]) -> None:
    from core.xtuner.runtime.speed import install, parts

    install.prepare(config, parts.Wish.from_json(details["speed"]), has_deepspeed=bool(details.get("deepspeed")))


def _xtuner_argv(run: RunDirectory, details: dict[str, Any]) -> list[str]:
    argv = ["train", str(run.source / f"{details['config']['name']}.py"), "--work-dir", str(run.path)]
    # One rank without DeepSpeed needs no DistributedDataParallel, which would hold every gradient twice.
    needs_group = details["world_size"] > 1 or details.get("deepspeed")
    argv += ["--launcher", "pytorch" if needs_group else "none"]
    if details.get("seed") is not None:
        argv += ["--seed", str(details["seed"])]
    if details.get("deepspeed"):
        argv += ["--deepspeed", str(run.path / "deepspeed.json")]
        _write_deepspeed(run, details)
    if resume := resume_from(run, details):
        argv += ["--resume", resume]
    return argv


def resume_from(run: RunDirectory, details: dict[str, Any]) -> str | None:
    """Where a run goes on in its own folder, Slurm's batch file or attempt.json says from what; run.json never changes."""
    resume = os.environ.get(RESUME_VARIABLE) or read_attempt(run).get("resume") or details.get("resume")
    return str(resume) if resume else None


def _write_deepspeed(run: RunDirectory, details: dict[str, Any]) -> None:
    """The DeepSpeed config of the run; on CPU in float32, because XTuner would take the CPU for a GPU with float16."""
    import torch

    # Runs of older versions only name one of XTuner's own.
    kept = details.get("deepspeed_config")
    config = json.loads(kept["text"] if kept else deepspeed.xtuner_text(details["deepspeed"]))
    if not torch.cuda.is_available():
        config |= {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
        config["zero_optimization"]["overlap_comm"] = False
    if os.environ.get("RANK", "0") == "0":
        write_json(run.path / "deepspeed.json", config)
    _wait_for(run.path / "deepspeed.json")


def join_group(details: dict[str, Any]) -> None:
    """A process group even for one rank: XTuner's flash-attention code asks for the rank. DeepSpeed makes its own."""
    import torch
    from torch import distributed

    if details.get("deepspeed") or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stand_alone() -> None:
    """Without torchrun around it (one process needs none) this process is rank 0 of 1, on a port that is free now."""
    if "RANK" in os.environ:
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def leave_group() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _wait_for(file: Path) -> None:
    import time

    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.05)
    raise FileNotFoundError(file)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"danlu: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
