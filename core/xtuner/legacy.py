"""The command that trains where the app's own code cannot run in the trainer: XTuner 0.1.x, or a Python older than 3.11."""

from collections.abc import Sequence
from pathlib import Path


def legacy_argv(
    argv: Sequence[str], config: Path, *, deepspeed: str | None, resume: str | None, seed: int | None, needs_group: bool
) -> list[str]:
    """`argv` of `core.xtuner.command.training_argv` with XTuner's own train script in place of the app's entry.

    No live hooks, then: metrics come from XTuner's own log of every tenth step, and a stop cannot save first. The options are
    those of `xtuner/tools/train.py` in 0.1.17 to 0.1.23.
    """
    run_folder = argv[-1]
    more = ["--seed", str(seed)] if seed is not None else []
    more += ["--deepspeed", deepspeed] if deepspeed else []
    more += ["--resume", resume] if resume else []
    launcher = "pytorch" if needs_group else "none"
    return [*argv[:-2], "xtuner.tools.train", str(config), "--work-dir", run_folder, "--launcher", launcher, *more]
