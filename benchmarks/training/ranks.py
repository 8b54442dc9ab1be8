"""Runs of the `multigpu` benchmark: started, watched, stopped and killed as the app does it, on 1 or 2 ranks.

A run is a run directory with a supervisor and the real entry; only its config is the synthetic one of `benchmarks.training.case`.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.training.case import Case, config_source
from benchmarks.training.held_entry import go_file, ready_file
from core.config.source import ConfigSource
from core.errors import ConflictError
from core.files import write_text
from core.gpu import devices
from core.launchers.local import command
from core.runs import processes
from core.runs.control import request_stop
from core.runs.devices import FOLDER_VARIABLE
from core.runs.directory import RunDirectory, RunSpec
from core.runs.launch import launch, now_utc
from core.runs.state import RunStatus, read_status

ENTRY: Final = "core.xtuner.runtime.entry"
HELD_ENTRY: Final = "benchmarks.training.held_entry"
SAVE_MODEL: Final = (
    "import sys; from pathlib import Path; from benchmarks.training.case import saved_llm; saved_llm(Path(sys.argv[1]))"
)
"""For `in_child`: write the random weights into the model's folder."""
_HOOKS: Final = (
    "from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook\n"
    "default_hooks = dict(timer=dict(type=IterTimerHook), logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=50), "
    "param_scheduler=dict(type=ParamSchedulerHook), sampler_seed=dict(type=DistSamplerSeedHook), "
    "checkpoint=dict(type=CheckpointHook, by_epoch=False, interval={interval}, max_keep_ckpts=-1, save_last={last}))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run. `steps` are optimizer steps; `batches` micro-batches of all ranks together make one."""

    name: str
    gpus: tuple[str, ...] = ()
    ranks: int = 1
    """Without GPUs: processes on the CPU."""
    shape: str = "1.8b"
    method: str = "lora"
    """lora, qlora or full"""
    deepspeed: str | None = None
    speed: str = "off"
    steps: int = 6
    batches: int = 16
    length: int = 2048
    dropout: float = 0.1
    save_every: int = 0
    """Optimizer steps; 0: no checkpoint."""
    resume: Path | None = None

    @property
    def world_size(self) -> int:
        return len(self.gpus) or self.ranks

    @property
    def accumulation(self) -> int:
        return self.batches // self.world_size


@dataclass(slots=True)
class Outcome:
    """How a run ended, and what it wrote."""

    setting: Setting
    run: RunDirectory
    status: RunStatus
    seconds: float
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def error(self) -> str | None:
        """The last words of a run that failed."""
        if self.status.exit_code == 0:
            return None
        log = self.run.log_file
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        said = [line.strip() for line in lines if "Error" in line and "ChildFailedError" not in line]
        return (said or lines or ["no log"])[0][:300]

    def tokens_per_second_per_rank(self, warm_steps: int = 2) -> float | None:
        """Median over optimizer steps after the first `warm_steps`; from the times at which their last lines were written."""
        count = self.setting.accumulation
        ends = [line for line in self.lines if line["iteration"] % count == 0]
        tokens = {line["iteration"]: line["tokens"] for line in self.lines}
        rates = [
            sum(tokens.get(n, 0) for n in range(old["iteration"] + 1, new["iteration"] + 1)) / (new["at"] - old["at"])
            for old, new in zip(ends[warm_steps - 1 :], ends[warm_steps:], strict=False)
        ]
        return statistics.median(rates) / self.setting.world_size if rates else None

    @property
    def peak_allocated_gib(self) -> float | None:
        """Of rank 0, by torch."""
        peaks = [line["memory_bytes"] for line in self.lines if line["memory_bytes"]]
        return round(max(peaks) / 2**30, 2) if peaks else None

    def per_card(self, key: str) -> list[float]:
        """The highest value that NVML showed for each card while the run lived."""
        highest: dict[int, float] = {}
        for sample in read_lines(self.run.gpu_file):
            for gpu in sample.get("gpus", []):
                highest[gpu["index"]] = max(highest.get(gpu["index"], 0.0), float(gpu.get(key) or 0.0))
        return [highest[index] for index in sorted(highest)]

    def step_losses(self) -> dict[int, float]:
        """Mean loss of each whole optimizer step, by its number from the start of the training."""
        count = self.setting.accumulation
        by_step: dict[int, list[float]] = {}
        for line in self.lines:
            by_step.setdefault((line["iteration"] - 1) // count + 1, []).append(line["loss"])
        return {step: statistics.fmean(losses) for step, losses in by_step.items() if len(losses) == count}


def write_config(setting: Setting, model: Path, folder: Path) -> str:
    """The config's text. The data set is the same for every number of ranks: its size follows from `batches`."""
    case = Case(
        side="stock", shape=setting.shape, method=setting.method, length=setting.length, accumulation=setting.batches,
        warm_steps=0, windows=setting.steps, dropout=setting.dropout,
    )  # fmt: skip
    interval = setting.save_every * setting.accumulation or 10**9
    text = config_source(case, model, folder)
    text = text.replace(
        "default_hooks = dict(checkpoint=None, logger=None)",
        _HOOKS.format(interval=interval, last=bool(setting.save_every)),
    )
    if "zero3" in str(setting.deepspeed):  # made on the spot, the model could not be cut while it is made
        text = text.replace("type=random_llm", "type=AutoModelForCausalLM.from_pretrained")
    source = ConfigSource(text)
    source = source.set("accumulative_counts", setting.accumulation)
    source = source.set("train_cfg.max_iters", setting.steps * setting.accumulation)
    if setting.method == "full":
        source = source.delete("model.lora")
    return source.text


def begin(setting: Setting, model: Path, home: Path, *, text: str | None = None, is_held: bool = False) -> RunDirectory:
    """Start a run detached. `text`: another config than the setting's own; `is_held`: it trains after `let_go`."""
    folder = home / setting.name
    write_text(folder / "source/config.py", text or write_config(setting, model, folder))
    started = command(sys.executable, folder, gpus=setting.gpus, world_size=setting.world_size, is_local=True)
    argv = [HELD_ENTRY if is_held and part == ENTRY else part for part in started.argv]
    root = str(Path(__file__).parents[2])
    details = {
        "config": {"name": "config"},
        "base_model": {"path": str(model), "model_type": "internlm2"},
        "data": [{"rows": None}],
        "world_size": setting.world_size,
        "accumulative_counts": setting.accumulation,
        "deepspeed": setting.deepspeed,
        "speed": setting.speed,
        "seed": None if setting.resume else 7,
        "resume": str(setting.resume) if setting.resume else None,
    }
    spec = RunSpec(
        id=setting.name, kind="train", title=setting.name, argv=argv, cwd=root, env=started.env,
        gpus=list(setting.gpus), created_at=now_utc(), details=details,
    )  # fmt: skip
    # One that is held does not use the cards yet, and must not keep others from them.
    with _devices(folder / "devices") if is_held else nullcontext():
        return launch(home, spec)


@contextmanager
def _devices(folder: Path) -> Iterator[None]:
    """Runs that begin meanwhile note in `folder` what they hold."""
    kept = os.environ[FOLDER_VARIABLE]
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.environ[FOLDER_VARIABLE] = kept


def wait_until_ready(run: RunDirectory, setting: Setting, *, seconds: float) -> bool:
    """Whether every rank of a held run has imported before it ended or `seconds` had passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and read_status(run).phase.is_active:
        if all(ready_file(run.path, rank).exists() for rank in range(setting.world_size)):
            return True
        time.sleep(0.1)
    return False


def let_go(run: RunDirectory) -> None:
    """Let a held run train."""
    go_file(run.path).touch()


def wait(run: RunDirectory, setting: Setting, *, seconds: float) -> Outcome:
    """Wait for the end; a run that takes longer than `seconds` is ended and counts as failed."""
    began = time.monotonic()
    while (status := read_status(run)).phase.is_active or status.ended_at is None:
        if time.monotonic() - began > seconds and status.phase.is_active and status.stop_mode != "cancel":
            request_stop(run, "cancel")
        if time.monotonic() - began > seconds + 60:
            break
        time.sleep(0.1)
    return Outcome(setting, run, status, time.monotonic() - began, read_lines(run.metrics_file))


def wait_for_iteration(run: RunDirectory, iteration: int, *, seconds: float) -> bool:
    """Whether the run wrote this iteration before it ended or `seconds` had passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(line["iteration"] >= iteration for line in read_lines(run.metrics_file)):
            return True
        if not read_status(run).phase.is_active:
            return False
        time.sleep(0.05)
    return False


def ask_to_stop(run: RunDirectory) -> bool:
    """Ask it to save and end; False if it has ended by itself."""
    try:
        request_stop(run, "save")
    except ConflictError:
        return False
    return True


def kill_rank(run: RunDirectory, rank: int) -> bool:
    """kill -9 of one trainer process; torchrun itself is left alone."""
    for stat in processes.marked(str(run.path)):
        arguments = processes.command_line(stat.pid)
        is_rank = f"RANK={rank}".encode() in Path(f"/proc/{stat.pid}/environ").read_bytes().split(b"\0")
        if ENTRY in " ".join(arguments) and "torch.distributed.run" not in arguments and is_rank:
            os.kill(stat.pid, signal.SIGKILL)
            return True
    return False


def used_bytes() -> list[int]:
    """Memory in use on each card now; empty without GPUs."""
    return [device.memory_used_bytes or 0 for device in devices()]


def free_after(before: list[int], *, seconds: float = 10.0) -> float:
    """Most MiB that any card holds beyond `before`, given some time: the driver frees memory after a process has ended."""
    deadline = time.monotonic() + seconds
    while True:
        left = max((now - then for now, then in zip(used_bytes(), before, strict=True)), default=0) / 2**20
        if left < 64 or time.monotonic() > deadline:
            return round(left, 1)
        time.sleep(0.25)


def in_child(code: str, *arguments: str) -> str:
    """Run Python in a process of its own, so that no GPU context stays here; the last line it printed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[-1]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file; none if it is missing."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
