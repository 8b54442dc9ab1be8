"""Loads a model folder (and an adapter) for chat, with progress, onto the device that was asked for or not at all.

Says before it starts if memory will not do. Never offloads silently.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from core.chat.adapter import read_adapter
from core.chat.cache import slot_bytes
from core.chat.decoder import Decoder
from core.chat.graphs import GraphRunner
from core.chat.projection import can_pack
from core.chat.prompt import PromptEncoder, hidden_tokens, make_encoder
from core.chat.runners import DecoderRunner, Runner, TransformersRunner
from core.chat.weights import read_config, read_weights, weight_files
from core.errors import InputError, MachineError
from core.files import read_json
from core.messages import message
from core.runs.job import Progress

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8: Final = "int8"
"""Asked for as a dtype: see `core.chat.projection`."""
_SLOTS: Final = {"cpu": 4, "cuda": 8}
_MAX_TOKENS: Final = 8192
_CACHE_SHARE: Final = 0.6
"""Of the memory that is free after loading, for keys and values; the rest is for reading prompts and for graphs."""
_SHORTEST_TOKENS: Final = 512
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
    """float32, bfloat16, float16, or int8: bfloat16 with its matrices rounded"""
    rounding_error: float
    """Relative error of the matrices by that rounding; 0 without it."""
    engine: str
    """`decoder`; on a GPU `kernels`, or `graphs` where our kernels cannot run; `transformers` for other families."""


@dataclass(frozen=True, slots=True)
class Source:
    """What to load, checked."""

    folder: Path
    adapter: Path | None
    device: torch.device
    dtype: torch.dtype
    slots: int
    max_tokens: int
    total_bytes: int
    is_int8: bool = False
    """Round the matrices to int8 once they are there (CPU, families that our decoder knows)."""


def load(details: Mapping[str, Any], progress: Progress) -> Loaded:
    """Load what `details` of the run name: model, adapter, device, dtype, template, slots, max_tokens.

    Raises InputError for folders that cannot be used and `chat.no_int8`, MachineError `chat.no_device`, `chat.not_enough_memory`.
    """
    folder = Path(details["model"])
    if not (folder / "config.json").is_file():
        raise InputError("chat.no_model", path=str(folder))
    device = choose_device(details.get("device"))
    total = sum(file.stat().st_size for file in weight_files(folder))
    wanted = details.get("dtype")
    is_int8 = wanted == INT8
    if is_int8 and (device.type != "cpu" or read_config(folder) is None):
        raise InputError("chat.no_int8", model=folder.name, device=_describe(device))
    source = Source(
        folder=folder,
        adapter=Path(details["adapter"]) if details.get("adapter") else None,
        device=device,
        dtype=choose_dtype("bfloat16" if is_int8 else wanted, device, folder),
        slots=int(details.get("slots") or _SLOTS[device.type]),
        max_tokens=int(details.get("max_tokens") or _MAX_TOKENS),
        total_bytes=total,
        is_int8=is_int8,
    )
    _require_memory(source)
    progress.update(0, total, message("chat.progress.tokenizer"), unit="bytes")
    tokenizer = load_tokenizer(folder)
    encoder = make_encoder(tokenizer, folder, details.get("prompt_template"))
    read = _load_transformers if read_config(folder) is None else load_decoder
    runner, engine = read(source, progress)
    progress.update(total, total, message("chat.progress.ready"), unit="bytes")
    return Loaded(
        runner=runner,
        encoder=encoder,
        stop_tokens=encoder.stop_tokens(_end_tokens(folder)),
        hidden_tokens=hidden_tokens(tokenizer),
        has_adapter=source.adapter is not None,
        device=_describe(device),
        dtype=INT8 if is_int8 else str(source.dtype).removeprefix("torch."),
        rounding_error=runner.rounding_error if isinstance(runner, DecoderRunner) else 0.0,
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
    """What was asked for; else bfloat16 where the device multiplies it, but float32 on a CPU for weights that are no bfloat16."""
    if wanted not in (None, "", "auto"):
        if wanted not in _DTYPES:
            raise InputError("chat.bad_dtype", dtype=wanted, known=", ".join([*_DTYPES, INT8]))
        return _DTYPES[str(wanted)]
    held = read_json(folder / "config.json").get("torch_dtype")
    if device.type == "cpu":
        return torch.bfloat16 if held == "bfloat16" and _multiplies_bfloat16() else torch.float32
    if held == "float16":
        return torch.float16
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them oneDNN converts, and float32 is faster."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_instructions = any(getattr(torch.cpu, name)() for name in known if hasattr(torch.cpu, name))
    return has_instructions and can_pack(torch.bfloat16, torch.device("cpu"))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises InputError `chat.no_tokenizer`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise InputError("chat.no_tokenizer", path=str(folder), reason=str(error)) from error


def load_decoder(source: Source, progress: Progress) -> tuple[Runner, str]:
    """The runner for a family that our decoder knows, and its engine (see `Loaded.engine`)."""
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
    decoder = Decoder(config, weights, pairs, "int8" if source.is_int8 else None)
    if device.type == "cuda":
        progress.update(total - 1, total, message("chat.progress.warming"), unit="bytes")
        free, _ = torch.cuda.mem_get_info()
        slots, longest = fit_cache(decoder, source.slots, source.max_tokens, free)
        graphs = make_graphs(decoder, slots, longest, has_adapter=bool(pairs))
        return graphs, "kernels" if graphs.is_fused else "graphs"
    return DecoderRunner(decoder, source.slots, source.max_tokens, has_adapter=bool(pairs)), "decoder"


def _load_transformers(source: Source, progress: Progress) -> tuple[Runner, str]:
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


def fit_cache(decoder: Decoder, slots: int, max_tokens: int, free_bytes: int) -> tuple[int, int]:
    """(slots, tokens a slot) whose keys and values fit into a share of the free memory: fewer conversations first, then shorter.

    Raises MachineError `chat.not_enough_memory` if not even one short conversation fits.
    """
    room = free_bytes * _CACHE_SHARE
    longest = min(max_tokens, decoder.config.max_positions)
    while True:
        size = slot_bytes(decoder.config, longest, decoder.dtype)
        if size <= room:
            return min(slots, int(room // size)), longest
        if longest <= _SHORTEST_TOKENS:
            gib = {
                "needed_gib": size / _CACHE_SHARE,
                "free_gib": free_bytes,
                "short_gib": size / _CACHE_SHARE - free_bytes,
            }
            figures = {name: round(value / 2**30, 1) for name, value in gib.items()}
            raise MachineError("chat.not_enough_memory", device=_describe(decoder.device), **figures)
        longest = max(longest // 2, _SHORTEST_TOKENS)


def can_fuse(device: torch.device) -> bool:
    """Whether Triton is installed and the GPU is one it compiles for."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    has_triton = importlib.util.find_spec("triton") is not None
    return is_nvidia and has_triton and bool(torch.cuda.get_device_capability(device) >= (8, 0))


def make_graphs(decoder: Decoder, slots: int, max_tokens: int, *, has_adapter: bool) -> GraphRunner:
    """The runner for a GPU, its graphs captured: with our kernels, or without if they cannot be compiled here (the log says why)."""
    if can_fuse(decoder.device):
        from triton.errors import TritonError

        try:
            runner = GraphRunner(decoder, slots, max_tokens, has_adapter=has_adapter, is_fused=True)
            runner.warm_up()
        except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(f"Triton kernels do not run here, torch's own are used: {error}", file=sys.stderr)
        else:
            return runner
    runner = GraphRunner(decoder, slots, max_tokens, has_adapter=has_adapter)
    runner.warm_up()
    return runner


def _end_tokens(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json and config.json, one or several."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        found += [value] if isinstance(value, int) else list(value or [])
    return found


def _require_memory(source: Source) -> None:
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
