"""Loads a model folder (and an adapter) for chat, with progress, onto the device that was asked for or not at all.

Says before it starts if memory will not do. Never offloads silently.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from core.chat.adapter import read_adapter
from core.chat.decoder import Decoder
from core.chat.generation import Runner
from core.chat.prompt import PromptEncoder, hidden_tokens, make_encoder
from core.chat.runners import DecoderRunner, GraphRunner, TransformersRunner
from core.chat.weights import read_config, read_weights, weight_files
from core.errors import InputError, MachineError
from core.files import read_json
from core.messages import message
from core.runs.job import Progress

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SLOTS: Final = {"cpu": 4, "cuda": 8}
_MAX_TOKENS: Final = 8192
_ROOM: Final = 1.05
"""Free memory asked for, as a multiple of the weights."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to answer, and what it really got."""

    runner: Runner
    encoder: PromptEncoder
    stop_tokens: frozenset[int]
    hidden_tokens: frozenset[int]
    """Special tokens: never shown."""
    has_adapter: bool
    device: str
    dtype: str
    engine: str
    """`decoder`, `graphs` or `transformers`."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What to load, checked."""

    folder: Path
    adapter: Path | None
    device: torch.device
    dtype: torch.dtype
    slots: int
    max_tokens: int
    total_bytes: int


def load(details: Mapping[str, Any], progress: Progress) -> Loaded:
    """Load what `details` of the run name: model, adapter, device, dtype, template, slots, max_tokens.

    Raises InputError for folders that cannot be used, MachineError `chat.no_device`, `chat.not_enough_memory`.
    """
    folder = Path(details["model"])
    if not (folder / "config.json").is_file():
        raise InputError("chat.no_model", path=str(folder))
    device = choose_device(details.get("device"))
    total = sum(file.stat().st_size for file in weight_files(folder))
    source = _Source(
        folder=folder,
        adapter=Path(details["adapter"]) if details.get("adapter") else None,
        device=device,
        dtype=choose_dtype(details.get("dtype"), device, folder),
        slots=int(details.get("slots") or _SLOTS[device.type]),
        max_tokens=int(details.get("max_tokens") or _MAX_TOKENS),
        total_bytes=total,
    )
    _require_memory(source)
    progress.update(0, total, message("chat.progress.tokenizer"), unit="bytes")
    tokenizer = load_tokenizer(folder)
    encoder = make_encoder(tokenizer, folder, details.get("prompt_template"))
    read = _load_transformers if read_config(folder) is None else _load_decoder
    runner, engine = read(source, progress)
    progress.update(total, total, message("chat.progress.ready"), unit="bytes")
    return Loaded(
        runner=runner,
        encoder=encoder,
        stop_tokens=encoder.stop_tokens(_end_tokens(folder)),
        hidden_tokens=hidden_tokens(tokenizer),
        has_adapter=source.adapter is not None,
        device=_describe(device),
        dtype=str(source.dtype).removeprefix("torch."),
        engine=engine,
    )


def choose_device(wanted: str | None) -> torch.device:
    """cuda where there is one, else cpu. Raises MachineError `chat.no_device` if `wanted` is not there."""
    has_cuda = torch.cuda.is_available()
    if wanted in (None, "", "auto"):
        return torch.device("cuda" if has_cuda else "cpu")
    if wanted not in ("cpu", "cuda") or (wanted == "cuda" and not has_cuda):
        raise MachineError("chat.no_device", device=wanted)
    return torch.device(str(wanted))


def choose_dtype(wanted: str | None, device: torch.device, folder: Path) -> torch.dtype:
    """What was asked for; else bfloat16 on a GPU that has it, float32 on the CPU (most compute in it fastest)."""
    if wanted not in (None, "", "auto"):
        if wanted not in _DTYPES:
            raise InputError("chat.bad_dtype", dtype=wanted, known=", ".join(_DTYPES))
        return _DTYPES[str(wanted)]
    if device.type == "cpu":
        return torch.float32
    if read_json(folder / "config.json").get("torch_dtype") == "float16":
        return torch.float16
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises InputError `chat.no_tokenizer`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise InputError("chat.no_tokenizer", path=str(folder), reason=str(error)) from error


def _load_decoder(source: _Source, progress: Progress) -> tuple[Runner, str]:
    folder, device, dtype, total = source.folder, source.device, source.dtype, source.total_bytes
    config = read_config(folder)
    assert config is not None
    done = 0

    def loaded(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        progress.update(min(done, total - 1), total, message("chat.progress.weights"), unit="bytes")

    weights = read_weights(folder, dtype, device, loaded)
    is_internlm2 = read_json(folder / "config.json").get("model_type") == "internlm2"
    adapter = source.adapter
    pairs = read_adapter(adapter, config, dtype, device, is_internlm2=is_internlm2) if adapter else {}
    decoder = Decoder(config, weights, pairs)
    if device.type == "cuda":
        progress.update(total - 1, total, message("chat.progress.warming"), unit="bytes")
        graphs = GraphRunner(decoder, source.slots, source.max_tokens, has_adapter=bool(pairs))
        _warm_up(graphs)
        return graphs, "graphs"
    return DecoderRunner(decoder, source.slots, source.max_tokens, has_adapter=bool(pairs)), "decoder"


def _load_transformers(source: _Source, progress: Progress) -> tuple[Runner, str]:
    from transformers import AutoModelForCausalLM

    progress.update(0, source.total_bytes, message("chat.progress.weights"), unit="bytes")
    model = AutoModelForCausalLM.from_pretrained(
        source.folder,
        torch_dtype=source.dtype,
        trust_remote_code=True,
        local_files_only=True,
        device_map={"": source.device},
    )
    if source.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(source.adapter))
    model.eval()
    positions = int(getattr(model.config, "max_position_embeddings", 0) or source.max_tokens)
    return TransformersRunner(model, source.slots, min(source.max_tokens, positions)), "transformers"


def _warm_up(runner: GraphRunner) -> None:
    """Capture the first graph before the first question, so that its first token is quick."""
    runner.read(0, [0] * 8, 0, tuned=True)
    runner.step([0], [0], [8], [True])


def _end_tokens(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json and config.json, one or several."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        found += [value] if isinstance(value, int) else list(value or [])
    return found


def _require_memory(source: _Source) -> None:
    held, device = read_json(source.folder / "config.json").get("torch_dtype") or "float16", source.device
    needed = int(source.total_bytes * source.dtype.itemsize / (4 if held == "float32" else 2) * _ROOM)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        import psutil

        free = psutil.virtual_memory().available
    if needed > free:
        raise MachineError(
            "chat.not_enough_memory",
            device=_describe(device),
            needed_gib=round(needed / 2**30, 1),
            free_gib=round(free / 2**30, 1),
            short_gib=round((needed - free) / 2**30, 1),
        )


def _describe(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
