"""Takes the weights out of a training checkpoint, for a new run that begins with them and with a new optimizer.

An adapter is loaded into the fresh one. A full fine-tune's weights are written as a model, which takes the base model's place.
"""

from pathlib import Path

from core.checkpoints.full import export_full
from core.checkpoints.tensors import widen
from core.checkpoints.torch_file import save
from core.checkpoints.weights import open_checkpoint
from core.files import require_absent, require_space
from core.messages import message
from core.runs.job import Progress


def write_weights(source: Path, target: Path, *, progress: Progress) -> int:
    """Write an adapter's weights (float32 masters where there are some) to the plain file `target`.

    Returns how many tensors there are. Raises InputError (damaged), ConflictError, MachineError.
    """
    import torch

    checkpoint = open_checkpoint(source)
    trained = checkpoint.masters or checkpoint.weights
    require_absent(target)
    require_space(target.parent, sum(tensor.nbytes for tensor in trained.values()))
    state = {}
    for done, (name, tensor) in enumerate(trained.items()):
        progress.update(done, len(trained), message("resume.reading_weights"), unit="tensors")
        state[name] = torch.from_numpy(widen(tensor.read(), tensor.dtype).copy())
    partial = target.with_name(f".{target.name}.partial")
    try:
        save(partial, {"state_dict": state, "meta": {}})
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return len(state)


def write_model(source: Path, target: Path, *, base_model: str, progress: Progress) -> int:
    """Write a full fine-tune's weights as the model folder `target`, with all that `base_model` has beside its own.

    In float32 where the optimizer kept float32 masters, so that nothing is rounded between two trainings. Returns how many tensors
    there are. Raises what `core.checkpoints.full.export_full` raises.
    """
    dtype = "F32" if open_checkpoint(source).masters else "keep"
    written = export_full(str(source), str(target), base_model=base_model, dtype=dtype, progress=progress)
    return int(written["tensors"])
