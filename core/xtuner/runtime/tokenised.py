"""Tokenised and packed training data, kept by what it was made of: a second run on the same data starts without tokenising.

The key covers every input: the data files' content, the tokenizer's files, the data set's settings in the config, the seed (packing
shuffles) and the libraries' versions. Only data sets whose rows come from local files are kept. `core.xtuner.runtime.tokenising`
makes what is missing before the ranks meet.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from core.xtuner.runtime.compat import type_name

_KEPT: Final = 6
"""Data sets in the folder; the one that was used longest ago goes first."""
_ABANDONED_SECONDS: Final = 86400.0
"""A half-written data set of this age belongs to nobody any more."""
_TOKENIZER_FILES: Final = ("*.model", "*.json", "*.txt", "tokenization_*.py")
_BUILDER: Final = "core.xtuner.runtime.tokenised.build"
_made: Final[dict[str, Any]] = {}
"""Made in this process and not to be kept on the disk: taken from here by the training that follows."""


def use_cache(config: Any, details: Mapping[str, Any], folder: Path) -> list[Any]:
    """Let the config's packed data sets, one or several joined, come from `folder` if they were made before. Those that can.

    None for a run without a seed or without the content hash of its data.
    """
    hashes = [data.get("sha256") for data in details["data"]]
    model = details["base_model"]
    if not (all(hashes) and details.get("seed") is not None and model.get("is_local")):
        return []
    made_of = {
        "data": hashes,
        "tokenizer": _tokenizer_hash(Path(model["path"])),
        "seed": details["seed"],
        "versions": {name: details["versions"].get(name) for name in ("xtuner", "transformers", "datasets")},
    }
    found = list(_packed(config.train_dataloader.dataset))
    for number, dataset in enumerate(found):
        settings = repr(sorted(dataset.to_dict().items(), key=lambda item: item[0]))
        key = json.dumps(made_of | {"settings": settings, "number": number}, sort_keys=True, default=str)
        dataset["type"] = _BUILDER
        dataset["kept_in"] = str(folder / hashlib.sha256(key.encode()).hexdigest()[:32])
    return found


def is_kept(folder: Path) -> bool:
    """Whether a whole data set lies there."""
    return (folder / "state.json").is_file()


def build(kept_in: str, **options: Any) -> Any:
    """XTuner's own data set, from the folder if it is there, else made now and put there."""
    from datasets import load_from_disk
    from torch import distributed
    from xtuner.dataset import process_hf_dataset

    folder = Path(kept_in)
    if is_kept(folder):
        print(f"danlu: tokenised data from {folder}", flush=True)
        folder.touch()
        found = load_from_disk(str(folder))
        found.length = found["length"]  # XTuner's samplers look for it
        return found
    if kept_in in _made:
        return _made.pop(kept_in)
    made = process_hf_dataset(**options)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        keep(made, folder)
        tidy(folder.parent, {folder.name})
    return made


def hold(made: Any, folder: Path) -> None:
    """For the training in this same process, where the disk has no room for it."""
    _made[str(folder)] = made


def keep(made: Any, folder: Path) -> OSError | None:
    """Write it under another name and rename it when whole. A full disk only means that it is not kept: then the error."""
    partial = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made.save_to_disk(str(partial))
        partial.replace(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_kept(folder):  # another run was faster
            return None
        print(f"danlu: tokenised data is not kept: {error}", flush=True)
        return error
    return None


def tidy(folder: Path, needed: Collection[str]) -> None:
    """Drop what is too much but for the `needed`, and what a killed process has left half written."""
    now = time.time()
    for path in folder.glob(".*.partial"):
        if now - _used_at(path, now) > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    kept = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for old in sorted(kept, key=lambda path: _used_at(path, now))[:-_KEPT]:
        if old.name not in needed:
            shutil.rmtree(old, ignore_errors=True)


def _used_at(path: Path, now: float) -> float:
    """`now` for what is not there any more: another run tidies too."""
    try:
        return path.stat().st_mtime
    except OSError:
        return now


def _packed(dataset: Any) -> Iterator[Any]:
    """XTuner's packed data sets in this one: itself, or the parts of a joined one."""
    name = type_name(dataset.get("type"))
    if name == "process_hf_dataset":
        yield dataset
    elif name == "ConcatDataset":
        for part in dataset.get("datasets") or []:
            yield from _packed(part)


def _tokenizer_hash(model: Path) -> str:
    digest = hashlib.sha256()
    names = {file for pattern in _TOKENIZER_FILES for file in model.glob(pattern)}
    for file in sorted(names):
        if not file.name.endswith(".index.json"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
