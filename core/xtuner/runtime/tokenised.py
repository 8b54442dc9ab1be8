"""Tokenised and packed training data, kept by what it was made of: a second run on the same data starts without tokenising.

The key covers every input: the data files' content, the tokenizer's files, the data set's settings in the config, the seed (packing
shuffles) and the libraries' versions. Only data sets whose rows come from local files are kept.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from core.xtuner.runtime.compat import type_name

_KEPT: Final = 6
"""Data sets in the folder; the one that was used longest ago goes first."""
_TOKENIZER_FILES: Final = ("*.model", "*.json", "*.txt", "tokenization_*.py")
_BUILDER: Final = "core.xtuner.runtime.tokenised.build"


def use_cache(config: Any, details: Mapping[str, Any], folder: Path) -> bool:
    """Let the config's one packed data set come from `folder` if it was made before. Whether it can.

    Not for joined data sets, nor for a run without a seed (it takes the checkpoint's) or without the content hash of its data.
    """
    dataset = config.train_dataloader.dataset
    hashes = [data.get("sha256") for data in details["data"]]
    model = details["base_model"]
    is_known = all(hashes) and details.get("seed") is not None and model.get("is_local")
    if type_name(dataset.get("type")) != "process_hf_dataset" or not is_known:
        return False
    made_of = {
        "data": hashes,
        "tokenizer": _tokenizer_hash(Path(model["path"])),
        "settings": repr(sorted(config.to_dict()["train_dataloader"]["dataset"].items(), key=lambda item: item[0])),
        "seed": details["seed"],
        "versions": {name: details["versions"].get(name) for name in ("xtuner", "transformers", "datasets")},
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:32]
    dataset["type"], dataset["kept_in"] = _BUILDER, str(folder / key)
    return True


def build(kept_in: str, **options: Any) -> Any:
    """XTuner's own data set, from the folder if it is there, else made now and put there."""
    from datasets import load_from_disk
    from torch import distributed
    from xtuner.dataset import process_hf_dataset

    folder = Path(kept_in)
    if (folder / "state.json").is_file():
        print(f"danlu: tokenised data from {folder}", flush=True)
        folder.touch()
        found = load_from_disk(str(folder))
        found.length = found["length"]  # XTuner's samplers look for it
        return found
    made = process_hf_dataset(**options)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        keep(made, folder)
    return made


def keep(made: Any, folder: Path) -> None:
    """Write it under another name and rename it when whole; then drop what is too much. A full disk only means no cache."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made.save_to_disk(str(partial))
        partial.replace(folder)
    except OSError as error:
        print(f"danlu: tokenised data is not kept: {error}", flush=True)
        shutil.rmtree(partial, ignore_errors=True)
        return
    kept = [path for path in folder.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for old in sorted(kept, key=lambda path: path.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _tokenizer_hash(model: Path) -> str:
    digest = hashlib.sha256()
    names = {file for pattern in _TOKENIZER_FILES for file in model.glob(pattern)}
    for file in sorted(names):
        if not file.name.endswith(".index.json"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
