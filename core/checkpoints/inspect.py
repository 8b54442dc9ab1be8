"""What a checkpoint is, found from file names and headers: form, stage, world size, iteration, complete or cut. Loads no weights."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.checkpoints.weights import Checkpoint, open_checkpoint
from core.errors import DanluError, InputError
from core.files import tree_size_bytes

_NAME: Final = re.compile(r"(iter|epoch)_(\d+)(\.pth)?$")


@dataclass(frozen=True, slots=True)
class CheckpointCard:
    """One checkpoint as a page shows it."""

    path: Path
    is_folder: bool
    """True: DeepSpeed wrote it."""
    iteration: int | None
    """Micro-steps done."""
    stage: int | None
    """ZeRO stage; 0: none; None: not known (damaged)."""
    world_size: int | None
    dtype: str | None
    """Of the weights, as trained: F32, BF16, F16."""
    is_adapter: bool | None
    parameters: int | None
    """Number of weights in it."""
    has_optimizer: bool
    """Whether training can go on from it."""
    size_bytes: int
    modified_at: float
    """Unix seconds."""
    lora_rank: int | None = None
    """r of the adapter's first layer."""
    problem: DanluError | None = None
    """Why it cannot be used; None: complete."""

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".pth")

    @property
    def is_complete(self) -> bool:
        return self.problem is None


def inspect_checkpoint(path: Path) -> CheckpointCard:
    """Look at one checkpoint. Damage is told in `problem`, not raised."""
    problem: DanluError | None = None
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = open_checkpoint(path)
        if lost := checkpoint.missing_ranks:
            ranks = ", ".join(map(str, lost))
            problem = InputError("checkpoints.cut", path=str(path), missing=ranks, world_size=checkpoint.world_size)
    except DanluError as error:
        problem = error
    return _card(path, checkpoint, problem)


def list_checkpoints(run_dir: Path) -> list[CheckpointCard]:
    """Checkpoints of a run, newest iteration first. Opens headers only (milliseconds each)."""
    if not run_dir.is_dir():
        return []
    paths = [path for path in run_dir.iterdir() if _NAME.search(path.name)]
    cards = [inspect_checkpoint(path) for path in paths]
    return sorted(cards, key=lambda card: (card.iteration or 0, card.modified_at), reverse=True)


def newest_complete(cards: list[CheckpointCard]) -> CheckpointCard | None:
    """The first that can be used, of cards in list_checkpoints' order."""
    return next((card for card in cards if card.is_complete), None)


def _card(path: Path, checkpoint: Checkpoint | None, problem: DanluError | None) -> CheckpointCard:
    named = _NAME.search(path.name)
    iteration = int(named[2]) if named else None
    exists = path.exists()
    size_bytes = 0 if not exists else tree_size_bytes(path) if path.is_dir() else path.stat().st_size
    first = next(iter(checkpoint.weights.values()), None) if checkpoint else None
    return CheckpointCard(
        path=path,
        is_folder=path.is_dir(),
        iteration=checkpoint.iteration if checkpoint and checkpoint.iteration is not None else iteration,
        stage=checkpoint.stage if checkpoint else None,
        world_size=checkpoint.world_size if checkpoint else None,
        dtype=first.dtype if first else None,
        is_adapter=any(".lora_" in name for name in checkpoint.weights) if checkpoint else None,
        parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.weights.values()) if checkpoint else None,
        has_optimizer=bool(checkpoint and checkpoint.has_optimizer),
        size_bytes=size_bytes,
        modified_at=path.stat().st_mtime if exists else 0.0,
        lora_rank=_lora_rank(checkpoint) if checkpoint else None,
        problem=problem,
    )


def _lora_rank(checkpoint: Checkpoint) -> int | None:
    """Rows of a `lora_A` matrix."""
    shapes = (tensor.shape for name, tensor in checkpoint.weights.items() if ".lora_A." in name)
    first = next(shapes, None)
    return first[0] if first else None
