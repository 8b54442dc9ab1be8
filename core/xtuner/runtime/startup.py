"""Starts fast and says where the time went. Runs in the trainer's process; measures phases, knows no model.

`prefetch` and `leave_out` come before torch is imported: this module imports nothing of the training stack itself.
"""

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any, Final

from core.files import read_json
from core.runs.startup import clock

_WEIGHTS: Final = ("*.safetensors", "*.bin")
_NEEDS_BITSANDBYTES: Final = ("bitsandbytes", "BitsAndBytes", "bnb", "8bit", "read_base", "_base_")
"""A config with one of these words may need it; the last two take over another file, which is not searched."""


def prefetch(folder: Path) -> None:
    """Ask the kernel to read the weights from the disk while Python imports. Nothing happens where it cannot."""
    for file in (file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        except (AttributeError, OSError):  # no such call on macOS
            return
        finally:
            os.close(handle)


def leave_out(source: str, model: Path, *, has_deepspeed: bool) -> list[str]:
    """Let packages that this run does not use look as if they were not installed, from now on in this process. Their names.

    mmengine and peft import them where they are found, for optimizers and layers that an XTuner run has no use for unless its config
    (`source`) or its model says so. They take a fifth of the CPU time of all imports.
    """
    unused = []
    if not has_deepspeed and "deepspeed" not in source.lower():
        unused.append("deepspeed")
    if not any(word in source for word in _NEEDS_BITSANDBYTES) and not _may_need_bitsandbytes(model):
        unused.append("bitsandbytes")
    unused = [name for name in unused if name not in sys.modules]
    for name in unused:
        sys.modules[name] = None  # type: ignore[assignment] # the import system's word for "there is none"
    return unused


def import_bitsandbytes() -> None:
    """Import it, unless it is left out or lacks, without torch's compiler, which takes a sixth of the CPU time of all imports.

    It compiles two optimizers for devices it has no kernels for, and takes them uncompiled where that fails.
    """
    import torch

    kept = torch.compile
    torch.compile = _no_compiler
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        pass
    finally:
        torch.compile = kept


def _no_compiler(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("not while bitsandbytes is being imported")


def format_once() -> None:
    """Let mmengine lay out its config once for each text, not seven times a run: it takes about half a second each, at every
    checkpoint too, while training stands still."""
    from mmengine.config import config

    lay_out, known = config.FormatCode, dict[tuple[str, str], Any]()

    def lay_out_once(text: str, **options: Any) -> Any:
        key = text, repr(options)
        if key not in known:
            known[key] = lay_out(text, **options)
        return known[key]

    config.FormatCode = lay_out_once


def measure(config: Any, run: Path) -> None:
    """Let the loaded config's run tell its phases: build steps of mmengine are timed, and a hook ends the clock."""
    from mmengine._strategy.base import BaseStrategy
    from mmengine.runner import FlexibleRunner, Runner

    for owner, name, phase in (
        (Runner, "build_model", "model"),
        (BaseStrategy, "build_model", "model"),
        (Runner, "build_dataloader", "data"),
        (FlexibleRunner, "build_dataloader", "data"),
    ):
        _time(owner, name, phase)
    hook = "core.xtuner.runtime.startup_hook.StartHook"
    config.custom_hooks = [*(config.get("custom_hooks") or []), {"type": hook, "run": str(run)}]


def _time(owner: type[Any], name: str, phase: str) -> None:
    held = owner.__dict__[name]
    is_static = isinstance(held, staticmethod)
    function = held.__func__ if is_static else held

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        with clock.span(phase):
            return function(*arguments, **options)

    setattr(owner, name, staticmethod(timed) if is_static else timed)


def _may_need_bitsandbytes(model: Path) -> bool:
    """Whether the model comes in a quantized form or its own code names the package; a model of the hub is not known."""
    file = model / "config.json"
    if not file.is_file() or "quantization_config" in read_json(file):
        return True
    return any("bitsandbytes" in code.read_text(encoding="utf-8", errors="replace") for code in model.glob("*.py"))
