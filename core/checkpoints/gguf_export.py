"""Model folder → GGUF file for llama.cpp and Ollama, with a Modelfile that carries the prompt template. Block of rows by block of rows.

The file's header and the simple quantisers are the `gguf` package's; K-quants are `kquants`. Sizes in memory are a few blocks.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.companions import DESCRIPTION, describe
from core.checkpoints.gguf_layout import Placed, add_metadata, place_tensors, read_config, read_sizes, rope_factors
from core.checkpoints.gguf_vocabulary import add_vocabulary, read_vocabulary
from core.checkpoints.kquants import quantize_q4_k, quantize_q6_k
from core.checkpoints.ollama import write_modelfile
from core.checkpoints.staging import stage
from core.checkpoints.tensors import is_finite, widen
from core.errors import DanluError, InputError
from core.files import read_json, require_absent, require_space
from core.messages import message
from core.runs.job import Progress
from core.xtuner.tokens import chat_template

KINDS: Final = ("f16", "q8_0", "q4_k_m")
_FILE_TYPES: Final = {"f16": 1, "q8_0": 7, "q4_k_m": 15}
"""gguf.LlamaFileType."""
_ITEM_BITS: Final = {"F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q4_K": 4.5}
_GROUPS: Final = {"Q8_0": 32, "Q6_K": 256, "Q4_K": 256}
"""Elements that share a scale: a row must be a multiple of it."""
_BLOCK_ELEMENTS: Final = 1 << 20
_THREADS: Final = max(2, min(8, os.cpu_count() or 2))


def export_gguf(model: str, target: str, *, kind: str = "q8_0", progress: Progress) -> dict[str, Any]:
    """Write the folder `target` with `<name>-<kind>.gguf` and a Modelfile from the model folder `model`. A job function.

    Returns {"path", "file", "size_bytes"}. Raises InputError: `checkpoints.gguf_architecture`, `checkpoints.gguf_tokenizer`,
    `checkpoints.gguf_rope`, `checkpoints.gguf_tensor`, `checkpoints.bad_dtype`, and those of read_folder.
    """
    if kind not in KINDS:
        raise InputError("checkpoints.bad_dtype", dtype=kind)
    source, folder = Path(model), Path(target)
    require_absent(folder)
    config = read_config(source)
    sizes = read_sizes(config)
    placed = place_tensors(source, config, sizes)
    types = {item.name: _type_of(item, kind, sizes.layers, is_tied=_is_tied(placed)) for item in placed}
    vocabulary = read_vocabulary(source, _rows_of_embedding(placed))
    described = _described(source)
    require_space(folder, sum(_stored_bytes(item.shape, types[item.name]) for item in placed) + 2**24)
    with stage(folder, {"gguf": str(source), "kind": kind, "at": source.stat().st_mtime}) as part:
        from gguf import GGUFWriter

        file = part / f"{source.name}-{kind}.gguf"
        writer = GGUFWriter(file, sizes.architecture)
        add_metadata(writer, config, sizes, source.name)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(2)
        add_vocabulary(writer, vocabulary, chat_template(source))
        _write(writer, placed, types, rope_factors(config, sizes), progress)
        write_modelfile(part, file.name, described, config, vocabulary)
        describe(
            part,
            kind="gguf",
            run=described.get("run"),
            checkpoint=described.get("checkpoint"),
            base_model=described.get("base_model"),
            prompt_template=described.get("prompt_template"),
            system=described.get("system"),
            dtype=kind,
            details={"source": str(source), "file": file.name},
        )
        size_bytes = file.stat().st_size
    return {"path": str(folder), "file": file.name, "size_bytes": size_bytes}


def _write(
    writer: Any, placed: list[Placed], types: Mapping[str, str], factors: NDArray[np.float32] | None, progress: Progress
) -> None:
    from gguf import GGMLQuantizationType

    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
    for item in placed:
        size = _stored_bytes(item.shape, types[item.name])
        kind = GGMLQuantizationType[types[item.name]]
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    if factors is not None:
        stream.write(factors.tobytes())
        writer.write_padding(stream, factors.nbytes)
    total, done = sum(item.source.nbytes for item in placed), 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in placed:
            written = 0
            for block in _in_order(pool, item, types[item.name]):
                written += stream.write(block)
                progress.check()
            writer.write_padding(stream, written)
            done += item.source.nbytes
            progress.update(done, total, message("checkpoints.progress.gguf"), unit="bytes")
    writer.close()


def _in_order(pool: ThreadPoolExecutor, item: Placed, kind: str) -> Iterator[bytes]:
    """The tensor's bytes, a few blocks ahead of what is being written."""
    blocks = _blocks(item)
    waiting: list[Future[bytes]] = [pool.submit(_encode, item, block, kind) for block in islice(blocks, 2 * _THREADS)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(_encode, item, block, kind) for block in islice(blocks, 1)]


def _blocks(item: Placed) -> Iterator[tuple[int, int]]:
    rows, width = item.shape[0], item.source.shape[-1] if len(item.source.shape) > 1 else 1
    step = max(1, _BLOCK_ELEMENTS // width) if len(item.shape) > 1 else rows
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _encode(item: Placed, block: tuple[int, int], kind: str) -> bytes:
    """Rows of one block in the file's type. Raises InputError `checkpoints.not_finite`, `checkpoints.overflow`."""
    first, end = block
    width = item.source.shape[-1] if len(item.source.shape) > 1 else 1
    if item.rows is None:
        raw = item.source.read_flat(first * width, end * width).reshape(-1, width)
    else:
        chosen = item.rows[first:end]
        low, high = int(chosen.min()), int(chosen.max()) + 1
        raw = item.source.read_flat(low * width, high * width).reshape(-1, width)[chosen - low]
    if not is_finite(raw, item.source.dtype):
        raise InputError("checkpoints.not_finite", path=str(item.source.file), name=item.name)
    values = widen(raw, item.source.dtype)
    if kind == "F32":
        return values.tobytes()
    if kind == "F16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not is_finite(halves, "F16"):
            raise InputError("checkpoints.overflow", name=item.name, dtype="float16", path=str(item.source.file))
        return halves.tobytes()
    return _quantize(values, kind).tobytes()


def _quantize(values: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    if kind == "Q4_K":
        return quantize_q4_k(values)
    if kind == "Q6_K":
        return quantize_q6_k(values)
    from gguf import GGMLQuantizationType, quants

    quantized: NDArray[np.uint8] = quants.quantize(values, GGMLQuantizationType[kind])
    return quantized


def _type_of(item: Placed, kind: str, layers: int, *, is_tied: bool) -> str:
    """llama.cpp's mixture: vectors whole, matrices in the kind; for q4_k_m the head and half of the v and down matrices finer."""
    if len(item.shape) < 2:
        return "F32"
    wanted = {"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}[kind]
    if wanted == "Q4_K" and _is_delicate(item.name, layers, is_tied=is_tied):
        wanted = "Q6_K"
    if item.shape[-1] % _GROUPS.get(wanted, 1):
        wanted = "Q8_0" if item.shape[-1] % _GROUPS["Q8_0"] == 0 else "F16"
    return wanted


def _is_delicate(name: str, layers: int, *, is_tied: bool) -> bool:
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        return True
    if not name.endswith(("attn_v.weight", "ffn_down.weight")):
        return False
    layer, eighth = int(name.split(".")[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    return int(np.prod(shape) * _ITEM_BITS[kind]) // 8


def _is_tied(placed: list[Placed]) -> bool:
    return all(item.name != "output.weight" for item in placed)


def _rows_of_embedding(placed: list[Placed]) -> int:
    return next(item.shape[0] for item in placed if item.name == "token_embd.weight")


def _described(folder: Path) -> dict[str, Any]:
    """danlu.json; empty for a model made elsewhere."""
    try:
        value = read_json(folder / DESCRIPTION)
    except DanluError:
        return {}
    return value if isinstance(value, dict) else {}
