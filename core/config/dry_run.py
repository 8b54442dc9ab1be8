"""A config of three optimizer steps, to prove that a training fits: the same batches and weights, no samples, no validation, no checkpoint.

Packed samples all have the maximum length, so that any batch is the longest one. Without packing the proof holds for what it meets.
"""

from pathlib import Path
from typing import Final

from core.config.edits import CHAT_HOOK
from core.config.findings import number
from core.config.library import read_config
from core.config.source import ConfigSource
from core.config.validation import set_validation
from core.errors import InputError
from core.files import write_text
from core.project import Project

UPDATES: Final = 3
_NEVER: Final = 10**9
_CHECKPOINT: Final = "default_hooks.checkpoint"


def dry_config(source: ConfigSource) -> ConfigSource:
    """The config cut down to three updates. Raises InputError `config.no_train_loop` if its length is given in a way of its own."""
    if not source.has("train_cfg.max_epochs"):
        raise InputError("config.no_train_loop")
    steps = UPDATES * max(1, int(number(source, "accumulative_counts", 1)))
    source = source.delete("train_cfg.max_epochs").set("train_cfg.max_iters", steps)
    if source.has(CHAT_HOOK):
        source = source.delete(CHAT_HOOK)
    source = set_validation(source, None)
    if source.has(f"{_CHECKPOINT}.interval"):
        source = source.set(f"{_CHECKPOINT}.interval", _NEVER, follow=False)
        source = source.set(f"{_CHECKPOINT}.save_last", False)
    return source


def write_dry_run(project: Project, config: Path) -> Path:
    """The cut config in a file of the app's own, named after the config; the config itself is not touched."""
    file = project.private / "dry_runs" / f"{config.stem}_dry_run.py"
    write_text(file, dry_config(ConfigSource(read_config(config))).text)
    return file
