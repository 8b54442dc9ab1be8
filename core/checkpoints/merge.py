"""Base model + adapters → merged model, block of rows by block of rows: no model is built, memory stays small and constant.

Each output shard has its base shard's name and header. Unchanged bytes are copied by the kernel; changed tensors are read, computed in
float32, rounded once and written by a few threads, so that reading, arithmetic and writing overlap.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from core.checkpoints.companions import copy_companions, describe, set_config, write_chat_template
from core.checkpoints.lora import Change, LoadedPair, Plan, apply_rows, load_pair, open_adapter, plan_changes
from core.checkpoints.shards import INDEX, Shard, make_header, read_folder
from core.checkpoints.staging import stage
from core.checkpoints.tensors import FLOATS, NUMPY_TYPES, Array, DiskTensor, is_finite, narrow, widen
from core.errors import DanluError, InputError
from core.files import read_json, require_absent, require_space, write_json
from core.messages import message
from core.runs.job import Progress

_BLOCK_ELEMENTS: Final = 1 << 20
_COPY_BYTES: Final = 1 << 24
_THREADS: Final = max(2, min(8, os.cpu_count() or 2))


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the result: where its values come from, where they go, what happens between."""

    name: str
    source: DiskTensor
    file: Path
    offset: int
    change: Change | None


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file of the result."""

    name: str
    header: bytes
    outputs: list[Output]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(output.source.nbytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything checked, nothing written."""

    base: Path
    shards: list[tuple[Shard, dict[str, str]]]
    """Base shard, and tensors that it gets in addition (new name → source)."""
    plan: Plan
    dtype: str

    @property
    def size_bytes(self) -> int:
        extra = sum(shard.tensors[source].nbytes for shard, new in self.shards for source in new.values())
        return sum(shard.size_bytes for shard, _ in self.shards) + extra


def merge_adapter(
    base_model: str,
    adapters: Sequence[str],
    target: str,
    *,
    weights: Sequence[float] | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the merged model `target`. Several adapters are summed, each times its weight (default 1).

    Returns {"path", "size_bytes", "changed", "tensors", "dtype"}. Raises DanluError before anything is written for a base or adapter that
    does not fit, `checkpoints.not_finite`/`checkpoints.overflow` if a result is NaN or infinite; then nothing is left.
    """
    folder = Path(target)
    require_absent(folder)
    merge = plan_merge(Path(base_model), [Path(adapter) for adapter in adapters], weights)
    require_space(folder, merge.size_bytes + 2**24)
    first = _described(Path(adapters[0]))
    with stage(folder, _identity(merge, adapters, weights)) as part:
        _write_shards(merge, part, progress)
        copy_companions(merge.base, part)
        _write_index(merge, part)
        write_chat_template(part, first.get("prompt_template"))
        if merge.plan.untied:
            set_config(part, {"tie_word_embeddings": False})
        recorded = first.get("base_model") or {}
        describe(
            part,
            kind="merged",
            run=first.get("run"),
            checkpoint=first.get("checkpoint"),
            base_model={"path": str(merge.base), "fingerprint": recorded.get("fingerprint")},
            prompt_template=first.get("prompt_template"),
            system=first.get("system"),
            dtype=merge.dtype,
            details={
                "adapters": [{"path": str(path), "weight": _weight(weights, n)} for n, path in enumerate(adapters)]
            },
        )
    tensors = sum(len(shard.tensors) for shard, _ in merge.shards)
    return {
        "path": str(folder),
        "size_bytes": merge.size_bytes,
        "changed": len(merge.plan.changes),
        "tensors": tensors,
        "dtype": merge.dtype,
    }


def plan_merge(base: Path, adapters: Sequence[Path], weights: Sequence[float] | None = None) -> MergePlan:
    """Read headers and the adapters, check that they belong together. Raises InputError, among them `checkpoints.quantized_base`."""
    if not (base / "config.json").is_file():
        raise InputError("checkpoints.no_base", path=str(base))
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise InputError("checkpoints.quantized_base", path=str(base))
    shards = read_folder(base)
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    opened = [open_adapter(folder, _weight(weights, number)) for number, folder in enumerate(adapters)]
    plan = plan_changes(opened, tensors, is_tied=bool(config.get("tie_word_embeddings")))
    for name in plan.changes:
        stored = tensors[plan.untied.get(name, name)].dtype
        if stored not in FLOATS:
            raise InputError("checkpoints.quantized_base", path=f"{base}: {name} {stored}")
    kinds = [tensor.dtype for tensor in tensors.values()]
    placed = [(shard, {new: old for new, old in plan.untied.items() if old in shard.tensors}) for shard in shards]
    return MergePlan(base, placed, plan, max(set(kinds), key=kinds.count))


def compute_blocks(source: DiskTensor, change: Change) -> Iterator[tuple[int, Array]]:
    """(first element, bits) of the changed tensor, block of rows by block of rows. Raises InputError if a result is not finite."""
    start = change.replacement or source
    pairs = [load_pair(pair) for pair in change.pairs]
    width = source.shape[-1] if len(source.shape) > 1 else 1
    rows = source.shape[0] if source.shape else 1
    magnitude = next(
        (widen(pair.magnitude.read(), pair.magnitude.dtype) for pair in change.pairs if pair.magnitude is not None),
        None,
    )
    by_column = magnitude is not None and change.pairs[0].is_transposed
    step = rows if by_column or len(source.shape) < 2 else max(1, _BLOCK_ELEMENTS // width)
    additions = [
        widen(tensor.read(), tensor.dtype).reshape(-1) * np.float32(factor) for tensor, factor in change.additions
    ]
    for row in range(0, rows, step):
        end = min(rows, row + step)
        values = widen(start.read_flat(row * width, end * width), start.dtype).reshape(end - row, width)
        if by_column and magnitude is not None:
            values = _dora_by_column(values, pairs, magnitude)
        else:
            values = apply_rows(values, pairs, row, end, magnitude)
        for addition in additions:
            values += addition[row * width : end * width].reshape(values.shape)
        yield row * width, narrow(values, source.dtype).reshape(-1)


def _dora_by_column(
    weight: NDArray[np.float32], pairs: Sequence[LoadedPair], magnitude: NDArray[np.float32]
) -> NDArray[np.float32]:
    """DoRA on a tensor that is in × out: outputs are columns, so norms need the whole tensor."""
    for pair in pairs:
        weight += pair.left @ pair.right
    weight *= magnitude / np.linalg.norm(weight, axis=0)
    return weight


class _Writer:
    """Fills shard files from several threads by offset, and counts bytes."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self._stopped = False

    def run(self, outputs: Sequence[Output], handle: int) -> None:
        """Write all `outputs` to the file `handle`; raises the first error after the other threads have ended."""
        # Unchanged tensors are copied by a thread while others compute; the largest changed ones first, so that none is left for the end.
        ordered = sorted(outputs, key=lambda output: (output.change is None, -output.source.nbytes))
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting: set[Future[int]] = {pool.submit(self._write, output, handle) for output in ordered}
            try:
                while waiting:
                    ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in ended:
                        self._done += future.result()
                    self._progress.update(self._done, self._total, message("checkpoints.progress.merge"), unit="bytes")
            except BaseException:
                self._stopped = True
                pool.shutdown(cancel_futures=True)
                raise

    def skip(self, size_bytes: int) -> None:
        """Bytes that lie there from before."""
        self._done += size_bytes

    def _write(self, output: Output, handle: int) -> int:
        if output.change is None:
            self._copy(output, handle)
            return output.source.nbytes
        item = NUMPY_TYPES[output.source.dtype].itemsize
        for element, bits in compute_blocks(output.source, output.change):
            if self._stopped:
                return 0
            if not is_finite(bits, output.source.dtype):
                _explain_not_finite(output)
            _write_at(handle, memoryview(bits.view(np.uint8)), output.offset + element * item)
        return output.source.nbytes

    def _copy(self, output: Output, handle: int) -> None:
        with open(output.source.file, "rb", buffering=0) as stream:
            done, size = 0, output.source.nbytes
            while done < size and not self._stopped:
                start, end = output.source.offset + done, output.offset + done
                got = _copy_range(stream.fileno(), handle, min(_COPY_BYTES, size - done), start, end)
                if got == 0:
                    raise InputError(
                        "checkpoints.truncated", path=str(output.source.file), size=output.source.file.stat().st_size
                    )
                done += got


def _write_shards(merge: MergePlan, part: Path, progress: Progress) -> None:
    writer = _Writer(merge.size_bytes, progress)
    for shard, new in merge.shards:
        final = part / shard.file.name
        plan = _plan_shard(shard, new, merge.plan, final)
        if final.exists() and final.stat().st_size == plan.size_bytes:  # whole: it was renamed after its sync
            writer.skip(plan.size_bytes)
            continue
        unfinished = final.with_name(f".{final.name}.writing")
        with ExitStack() as stack:
            handle = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            stack.callback(os.close, handle)
            os.posix_fallocate(handle, 0, plan.size_bytes)
            _write_at(handle, memoryview(plan.header), 0)
            writer.run(plan.outputs, handle)
            os.fsync(handle)
        unfinished.rename(final)


def _plan_shard(shard: Shard, new: Mapping[str, str], plan: Plan, file: Path) -> ShardPlan:
    """The base's header byte for byte, unless tensors are added."""
    sources = {name: shard.tensors[name] for name in shard.tensors} | {
        name: shard.tensors[old] for name, old in new.items()
    }
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in sources.items()}
    header = make_header(layout, shard.metadata) if new else shard.header_bytes
    outputs, offset = [], len(header)
    for name, tensor in sources.items():
        outputs.append(Output(name, tensor, file, offset, plan.changes.get(name)))
        offset += tensor.nbytes
    return ShardPlan(shard.file.name, header, outputs)


def _write_index(merge: MergePlan, part: Path) -> None:
    """The base's index, byte for byte unless tensors were added."""
    index_file = merge.base / INDEX
    if not index_file.exists():
        return
    if not merge.plan.untied:
        (part / INDEX).write_bytes(index_file.read_bytes())
        return
    index = read_json(index_file)
    for shard, new in merge.shards:
        index["weight_map"] |= dict.fromkeys(new, shard.file.name)
    index["metadata"] = {
        **index.get("metadata", {}),
        "total_size": sum(
            t.nbytes for s, n in merge.shards for t in [*s.tensors.values(), *(s.tensors[o] for o in n.values())]
        ),
    }
    write_json(part / INDEX, index)


def _identity(merge: MergePlan, adapters: Sequence[str], weights: Sequence[float] | None) -> dict[str, Any]:
    """What a killed merge must have in common with this one to go on in its folder."""
    files = [shard.file for shard, _ in merge.shards] + [
        Path(folder) / "adapter_model.safetensors" for folder in adapters
    ]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = repr((stats, list(weights or [])))
    return {"merge": hashlib.sha256(text.encode()).hexdigest()}


def _described(adapter: Path) -> dict[str, Any]:
    """danlu.json of an adapter; empty for one that was made elsewhere."""
    try:
        value = read_json(adapter / "danlu.json")
    except DanluError:
        return {}
    return value if isinstance(value, dict) else {}


def _weight(weights: Sequence[float] | None, number: int) -> float:
    return float(weights[number]) if weights else 1.0


def _explain_not_finite(output: Output) -> None:
    source = output.source.read()
    code = "checkpoints.overflow" if is_finite(source, output.source.dtype) else "checkpoints.not_finite"
    raise InputError(code, path=str(output.source.file), name=output.name, dtype=output.source.dtype)


def _write_at(handle: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def _copy_range(source: int, target: int, count: int, start: int, end: int) -> int:
    """Copy inside the kernel where the file system can, else through memory."""
    try:
        return os.copy_file_range(source, target, count, start, end)
    except OSError:
        data = os.pread(source, count, start)
        _write_at(target, memoryview(data), end)
        return len(data)
