"""Takes the weights out of a training checkpoint, for a new run that begins with them and with a new optimizer."""

from pathlib import Path

from core.checkpoints.tensors import widen
from core.checkpoints.weights import open_checkpoint
from core.errors import InputError
from core.files import require_absent, require_space
from core.messages import message
from core.runs.job import Progress


def write_weights(source: Path, target: Path, *, progress: Progress) -> int:
    """Write the trained weights of any checkpoint (float32 masters where there are some) to the plain file `target`.

    Returns how many tensors there are. Raises InputError (damaged, no adapter in it), ConflictError, MachineError.
    """
    import torch

    checkpoint = open_checkpoint(source)
    trained = checkpoint.masters or checkpoint.weights
    if not any(".lora_" in name for name in trained):
        raise InputError("resume.full_weights", path=str(source))
    require_absent(target)
    require_space(target.parent, sum(tensor.nbytes for tensor in trained.values()))
    state = {}
    for done, (name, tensor) in enumerate(trained.items()):
        progress.update(done, len(trained), message("resume.reading_weights"), unit="tensors")
        state[name] = torch.from_numpy(widen(tensor.read(), tensor.dtype).copy())
    partial = target.with_name(f".{target.name}.partial")
    try:
        torch.save({"state_dict": state, "meta": {}}, partial)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return len(state)
