"""Two GPUs against one: speed and memory for each method and ZeRO stage, stop → 1 GPU → 2 GPUs through reshaping, a killed rank.

`python -m benchmarks.multigpu [--shape 1.8b] [--parts speed resume kill full large] [--seconds 460]`; with `--shape tiny` it runs on
the CPU with two gloo ranks. Cases that no longer fit into the time are left out and named.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.result import NoGpu, Result
from benchmarks.training import ranks
from benchmarks.training.case import make_model_folder
from benchmarks.training.pace_cases import FULL, LARGE, SPEED, PaceCase, train_each
from benchmarks.training.ranks import Outcome, Setting
from core.checkpoints.inspect import inspect_checkpoint, list_checkpoints, newest_complete
from core.gpu import devices
from core.runs.devices import FOLDER_VARIABLE

PARTS: Final = ("speed", "resume", "kill", "full", "large")
_RESUMED: Final[dict[str, Any]] = {
    "deepspeed": "deepspeed_zero2", "speed": "auto", "dropout": 0.0, "steps": 8, "save_every": 8,
}  # fmt: skip
_CASE_SECONDS: Final = 100.0
"""Longest that one run may take."""
_RESHAPE: Final = """
import json, sys, time
import deepspeed, torch
from core.checkpoints.reshape import reshape
from core.runs.job import SilentProgress
began = time.perf_counter()
done = reshape(sys.argv[1], sys.argv[2], int(sys.argv[3]), accumulative_counts=int(sys.argv[4]), progress=SilentProgress())
print(json.dumps({"seconds": time.perf_counter() - began, "tensors": done["tensors_verified"], "digest": done["digest"]}))
"""


@dataclass
class Bench:
    """What all parts share: cards, folders, time, and the figures so far."""

    shape: str
    cards: tuple[str, ...]
    model: Path
    home: Path
    deadline: float
    figures: dict[str, float | int | str | None] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether a case of about `seconds` still fits; if not, it is noted as left out."""
        fits = time.monotonic() + seconds < self.deadline
        if not fits:
            self.left_out.append(name)
        return fits

    def setting(self, name: str, count: int, **options: Any) -> Setting:
        """A setting for `count` ranks; small figures for the tiny shape."""
        sizes = {"length": 64, "batches": 4} if self.shape == "tiny" else {}
        return Setting(name=name, gpus=self.cards[:count], ranks=count, shape=self.shape, **{**sizes, **options})

    def note(self, **figures: float | str | None) -> None:
        """Keep figures, and print them at once: what is measured stays known if the call is cut off."""
        self.figures |= figures
        print(json.dumps(figures), file=sys.stderr, flush=True)

    def finish(self, setting: Setting) -> Outcome:
        """Start and wait; a failure is noted under the setting's name."""
        outcome = ranks.wait(ranks.begin(setting, self.model, self.home), setting, seconds=_CASE_SECONDS)
        if outcome.error:
            self.note(**{f"{setting.name}_error": outcome.error})
        return outcome


def run() -> Result:
    """All parts on 2 GPUs in InternLM2-1.8B's shape. Raises NoGpu if there are fewer."""
    if len(devices()) < 2:
        raise NoGpu("needs two NVIDIA GPUs")
    return measure("1.8b", PARTS, 460.0)


def measure(shape: str, parts: tuple[str, ...], seconds: float) -> Result:
    """Run `parts` within about `seconds`. On a machine without GPUs the ranks are gloo processes on the CPU."""
    cards = tuple(device.uuid or str(device.index) for device in devices())[:2]
    with _home() as home:
        os.environ[FOLDER_VARIABLE] = str(
            home / "devices"
        )  # The bench holds the cards; its runs queue among themselves.
        model = make_model_folder(shape, Path(tempfile.gettempdir()) / f"danlu_bench_{shape}")
        bench = Bench(shape, cards, model, home, time.monotonic() + seconds)
        bench.note(shape=shape, cards=len(cards), card=next((d.name for d in devices()), "cpu"))
        for name, part in (("resume", _resume), ("kill", _kill)):
            if name in parts:
                part(bench)
        paced = {"speed": SPEED, "full": FULL, "large": LARGE}
        if cases := tuple(case for name, some in paced.items() if name in parts for case in some):
            _pace(bench, cases)
        for kind in ("budget_off", "left_mib"):
            if found := [
                value for key, value in bench.figures.items() if key.endswith(f"_{kind}") and value is not None
            ]:
                bench.note(**{f"largest_{kind}": max(found)})
        bench.note(failed=sum(key.endswith("_error") for key in bench.figures))
        bench.note(left_out=", ".join(bench.left_out), seconds=round(seconds - bench.deadline + time.monotonic(), 1))
    return Result(bench.figures, _targets(bench.figures))


def _targets(figures: dict[str, Any]) -> dict[str, tuple[str, float]]:
    known: dict[str, tuple[str, float]] = {
        key: (">=", 0.92) for key in figures if key.endswith("_efficiency") and "zero3" not in key
    }
    known |= {"largest_budget_off": ("<=", 0.1)} if "largest_budget_off" in figures else {}
    known |= {"largest_left_mib": ("<", 64.0)} if "largest_left_mib" in figures else {}
    known |= {key: ("<=", 30.0) for key in figures if key == "killed_rank_noticed_seconds"}
    known["failed"] = ("==", 0)
    known |= {key: ("==", 1) for key in figures if key.endswith(("_equal", "_complete"))}
    return known


def _pace(bench: Bench, cases: tuple[PaceCase, ...]) -> None:
    """Speed and memory of `cases`; on the CPU only LoRA, in fewer ways."""
    chosen = cases if bench.cards else tuple(case for case in cases if case.method == "lora" and case.shape is None)
    bench.left_out += train_each(
        chosen, cards=bench.cards, shape=bench.shape, home=bench.home, note=bench.note,
        left_seconds=lambda: bench.deadline - time.monotonic(),
    )  # fmt: skip


def _resume(bench: Bench) -> None:
    """2 GPUs to the end; again, stopped by a person; then on 1 GPU and back on 2, each time through reshaping."""
    if not bench.has_time("resume", 150):
        return
    whole = bench.finish(bench.setting("whole_2", 2, **_RESUMED))
    first = bench.setting("first_2", 2, **_RESUMED)
    before = ranks.used_bytes()
    run = ranks.begin(first, bench.model, bench.home)
    # Asked for in the second step, heard at its end or at that of the third.
    ranks.wait_for_iteration(run, first.accumulation + 1, seconds=_CASE_SECONDS)
    asked = time.monotonic()
    ranks.ask_to_stop(run)
    stopped = ranks.wait(run, first, seconds=_CASE_SECONDS)
    bench.note(stop_and_save_seconds=round(time.monotonic() - asked, 1), stop_left_mib=ranks.free_after(before))
    saved = newest_complete(list_checkpoints(run.path))
    if saved is None:
        bench.note(resume_error=stopped.error or "no checkpoint")
        return
    one, digest = _carry_over(bench, saved.path, first, bench.setting("second_1", 1, **_RESUMED), stop_after=2)
    middle = newest_complete(list_checkpoints(one.run.path))
    if middle is None:
        bench.note(resume_error=one.error or "no checkpoint of the second run")
        return
    two, _ = _carry_over(bench, middle.path, one.setting, bench.setting("third_2", 2, **_RESUMED))
    expected = whole.step_losses()
    found = {**stopped.step_losses(), **one.step_losses(), **two.step_losses()}
    differences = [abs(found[n] - expected[n]) / abs(expected[n]) for n in expected if n in found]
    bench.note(
        resume_steps_compared=len(differences),
        resume_losses=" ".join(f"{found[n]:.4f}/{expected[n]:.4f}" for n in sorted(expected) if n in found),
        resume_largest_relative_difference=round(max(differences), 6) if differences else None,
        all_steps_equal=int(sorted(found) == sorted(expected)),
        partitions_digest=digest,
    )


def _carry_over(bench: Bench, source: Path, old: Setting, new: Setting, *, stop_after: int = 0) -> tuple[Outcome, str]:
    """Reshape `source` for the new setting's ranks and train on; `stop_after`: optimizer steps after which it is asked to stop."""
    name = new.name
    iteration = (inspect_checkpoint(source).iteration or 0) * old.world_size // new.world_size
    target = bench.home / f"{name}_from" / f"iter_{iteration}.pth"
    target.parent.mkdir()
    arguments = (str(source), str(target), str(new.world_size), str(old.accumulation))
    done = json.loads(ranks.in_child(_RESHAPE, *arguments))
    bench.note(**{f"{name}_reshape_seconds": round(done["seconds"], 2), f"{name}_tensors_verified": done["tensors"]})
    setting = replace(new, resume=target)
    run = ranks.begin(setting, bench.model, bench.home)
    if stop_after:
        ranks.wait_for_iteration(run, iteration + new.accumulation * (stop_after - 1) + 1, seconds=_CASE_SECONDS)
        ranks.ask_to_stop(run)
    outcome = ranks.wait(run, setting, seconds=_CASE_SECONDS)
    if outcome.error:
        bench.note(**{f"{name}_error": outcome.error})
    return outcome, str(done["digest"])


def _kill(bench: Bench) -> None:
    """kill -9 of rank 1: the run must fail soon, leave no memory, and go on from its last checkpoint."""
    if not bench.has_time("kill", 80):
        return
    setting = bench.setting("killed_2", 2, **_RESUMED | {"steps": 40, "save_every": 2})
    before = ranks.used_bytes()
    run = ranks.begin(setting, bench.model, bench.home)
    ranks.wait_for_iteration(run, 3 * setting.accumulation, seconds=_CASE_SECONDS)
    killed = time.monotonic()
    if not ranks.kill_rank(run, 1):
        bench.note(kill_error="rank 1 not found")
        return
    outcome = ranks.wait(run, setting, seconds=_CASE_SECONDS)
    bench.note(
        killed_rank_noticed_seconds=round(time.monotonic() - killed, 1),
        killed_rank_phase=str(outcome.status.phase),
        killed_rank_left_mib=ranks.free_after(before),
    )
    saved = newest_complete(list_checkpoints(run.path))
    bench.note(
        killed_run_last_checkpoint=saved.name if saved else None, killed_run_checkpoint_complete=int(saved is not None)
    )
    if saved is not None and bench.has_time("after_kill", 40):
        steps = (saved.iteration or 0) // setting.accumulation + 2
        after = bench.finish(replace(setting, name="after_kill_2", steps=steps, save_every=0, resume=saved.path))
        bench.note(after_kill_complete=int(after.error is None and len(after.lines) == 2 * setting.accumulation))


@contextmanager
def _home() -> Iterator[Path]:
    """A folder for the runs; kept, if DANLU_BENCH_KEEP names one."""
    kept = os.environ.get("DANLU_BENCH_KEEP")
    folder = Path(kept or tempfile.mkdtemp(prefix="danlu_multigpu_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multigpu", description=__doc__)
    parser.add_argument("--shape", default="1.8b", choices=("tiny", "0.6b", "1.8b", "7b"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seconds", type=float, default=460.0)
    arguments = parser.parse_args(argv)
    if arguments.shape != "tiny" and len(devices()) < 2:
        print("needs two NVIDIA GPUs; --shape tiny runs on the CPU", file=sys.stderr)
        return 2
    result = measure(arguments.shape, tuple(arguments.parts), arguments.seconds)
    print(json.dumps({"figures": result.figures, "ok": result.ok, "missed": result.missed}))
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
