"""`python -m core.launchers.newest RUN_DIR` prints the newest whole checkpoint of a run: what a job that starts again goes on from."""

import sys
from pathlib import Path

from core.checkpoints.inspect import list_checkpoints, newest_complete


def newest(run_folder: Path) -> Path | None:
    """The newest checkpoint that is whole and holds the optimizer."""
    card = newest_complete([card for card in list_checkpoints(run_folder) if card.has_optimizer])
    return card.path if card else None


if __name__ == "__main__":
    print(newest(Path(sys.argv[1])) or "")
