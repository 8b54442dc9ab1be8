"""What a config is checked against and filled from: the model folder, the data file, the machine. Reads small files only."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from core.data.formats import Format, dataset_map_fn_for, detect, is_native
from core.data.reader import Row, read_rows, sample_rows, sniff
from core.errors import InputError
from core.files import read_json
from core.project import Project
from core.xtuner.tokens import TrainingTokens, guess_template, training_tokens

_COUNTED_BYTES: Final = 32 * 2**20
"""Rows of larger files are estimated from the size of the sample."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model folder, as far as a config depends on it."""

    path: Path
    model_type: str
    template: str | None
    """Key of PROMPT_TEMPLATE that fits."""
    tokens: TrainingTokens
    is_quantized: bool
    weight_bytes: int
    context_length: int | None = None
    """Positions it was trained for."""

    @property
    def is_internlm2(self) -> bool:
        return self.model_type in {"internlm2", "internlm3"}


@dataclass(frozen=True, slots=True)
class DataFacts:
    """A data file, as far as a config depends on it."""

    path: Path
    format: Format
    rows: int
    """Exact up to 32 MiB, estimated above."""
    size_bytes: int

    @property
    def is_native(self) -> bool:
        """Whether XTuner reads it as it is."""
        return is_native(self.format)

    @property
    def map_fn(self) -> str | None:
        """Name of the dataset_map_fn; None for XTuner's own `conversation` rows."""
        return dataset_map_fn_for(self.format)


@dataclass(frozen=True, slots=True)
class Machine:
    """What training will find. Sensors that are missing are None."""

    gpu_count: int = 0
    supports_bf16: bool | None = None
    has_flash_attention: bool = False
    has_bitsandbytes: bool = False
    deepspeed_version: str | None = None
    cpu_count: int = 1
    free_bytes: int | None = None
    """On the disk that holds the project's runs."""


def read_model(folder: Path) -> ModelFacts:
    """Facts of a model folder. Raises InputError `config.no_model` if it has no readable config.json."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError("config.no_model", path=str(folder))
    config: dict[str, Any] = read_json(file)
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return ModelFacts(
        path=folder,
        model_type=str(config.get("model_type", "")),
        template=guess_template(folder),
        tokens=training_tokens(folder),
        is_quantized="quantization_config" in config,
        weight_bytes=sum(file.stat().st_size for file in weights),
        context_length=config.get("max_position_embeddings"),
    )


def read_data(path: Path) -> DataFacts:
    """Facts of a data file; remembered until the file changes. Raises InputError from `core.data.reader`."""
    if not path.is_file():
        raise InputError("files.missing", path=str(path))
    status = path.stat()
    return _read_data(path, status.st_size, status.st_mtime_ns)


@cache
def _read_data(path: Path, size_bytes: int, _changed_at: int) -> DataFacts:
    source = sniff(path)
    sample = sample_rows(source)
    if size_bytes <= _COUNTED_BYTES:
        rows = sum(1 for item in read_rows(source) if isinstance(item, Row))
    else:
        sampled_bytes = max(1, sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in sample))
        rows = size_bytes * len(sample) // sampled_bytes
    return DataFacts(path, detect(sample).format, rows, size_bytes)


def model_folders(project: Project) -> list[Path]:
    """Base models of the project: `model/` itself, as in the guide, or its sub-folders."""
    folders = [project.model, *sorted(path for path in project.model.glob("*") if path.is_dir())]
    return [folder for folder in folders if (folder / "config.json").is_file()]


def read_machine(project: Project) -> Machine:
    """Facts of this machine without importing torch."""
    gpu_count, supports_bf16 = _gpus()
    return Machine(
        gpu_count=gpu_count,
        supports_bf16=supports_bf16,
        has_flash_attention=importlib.util.find_spec("flash_attn") is not None,
        has_bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
        deepspeed_version=_version("deepspeed"),
        cpu_count=os.cpu_count() or 1,
        free_bytes=shutil.disk_usage(project.root).free,
    )


@cache
def _gpus() -> tuple[int, bool | None]:
    """How many NVIDIA GPUs, and whether all have bfloat16 (compute capability 8.0 and later); (0, None) without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        capabilities = [pynvml.nvmlDeviceGetCudaComputeCapability(handle) for handle in handles]
    except pynvml.NVMLError:
        return 0, None
    return len(handles), all(capability >= (8, 0) for capability in capabilities) if handles else None


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
