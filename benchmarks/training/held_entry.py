"""The trainer's entry, held back: it imports, says that it is ready, and trains when it is told to.

So several runs can import at the same time and train one after the other. What is measured is the training, which is the real entry's.
"""

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Final

_IMPORTS: Final = (
    "core.xtuner.runtime.entry",
    "core.xtuner.runtime.speed.install",
    "xtuner.tools.train",
    "deepspeed",
    "peft",
)


def ready_file(run: Path, rank: int) -> Path:
    """Written by each rank when it has imported."""
    return run / f"ready.{rank}"


def go_file(run: Path) -> Path:
    """What all ranks of the run wait for."""
    return run / "go"


def main(argv: list[str]) -> int:
    from core.xtuner.runtime import entry, startup

    startup.import_bitsandbytes()
    for name in _IMPORTS:
        importlib.import_module(name)
    run = Path(argv[0])
    ready_file(run, int(os.environ.get("RANK", "0"))).touch()
    while not go_file(run).exists():
        time.sleep(0.02)
    return entry.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
