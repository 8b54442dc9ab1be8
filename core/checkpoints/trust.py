"""Whether a checkpoint may be loaded: its pickles are read by the restricted unpickler, which runs nothing, before torch reads them.

mmengine and DeepSpeed load with `weights_only=False`, so a checkpoint from elsewhere could run code in the trainer.
"""

from pathlib import Path
from typing import Final

from core.checkpoints.reader import read_torch_file
from core.errors import InputError

_ENDINGS: Final = (".pt", ".pth", ".bin", ".ckpt")


def scan(checkpoint: Path) -> int:
    """Read every pickle of a checkpoint (file or folder) without running it; returns how many there were.

    Raises InputError: `checkpoints.unsafe` for a name that XTuner, mmengine and DeepSpeed do not write, `checkpoints.strange_file`
    for a pickle that is no torch file, and those of `read_torch_file` for damage.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file()) if checkpoint.is_dir() else [checkpoint]
    if strange := next((file for file in files if file.suffix in (".pkl", ".pickle")), None):
        raise InputError("checkpoints.strange_file", path=str(strange))
    pickles = [file for file in files if file.suffix in _ENDINGS]
    for file in pickles:
        read_torch_file(file)
    return len(pickles)
