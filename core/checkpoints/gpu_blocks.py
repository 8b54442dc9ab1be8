"""What `blocks` does, on a GPU: W + s·B·A in float32, rounded once. torch is imported when it is asked for, in the job's own process.

Every thread of the writer has its own stream and its own pinned memory, so that one reads while others compute, copy and write. The
GPU holds one block a thread and the adapter's factors of the tensor at hand, whatever the model. The result differs from the
processor's by one rounding step at most: the products are summed in another order.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np

from core.checkpoints.blocks import NotFiniteError, changed_blocks, matrix_shape, read_rows
from core.checkpoints.direct import ALIGNMENT_BYTES, Bytes
from core.checkpoints.lora import Change, load_pair
from core.checkpoints.tensors import NUMPY_TYPES, Array, DiskTensor, widen
from core.errors import MachineError

BLOCK_ELEMENTS: Final = 1 << 22
CPU: Final = "cpu"
CUDA: Final = "cuda"


class GpuBlocks:
    """Call it as `blocks.changed_blocks`, from any number of threads.

    `device`: torch's name of it; "cpu" gives the same arithmetic without a GPU. Raises MachineError `checkpoints.no_gpu`.
    """

    def __init__(self, device: str = CUDA) -> None:
        import torch

        if device != CPU and not torch.cuda.is_available():
            raise MachineError("checkpoints.no_gpu")
        torch.set_float32_matmul_precision("highest")  # no TF32: float32 is what the processor computes in
        self._torch, self._device = torch, torch.device(device)
        self._lanes = threading.local()

    def __call__(self, source: DiskTensor, change: Change) -> Iterator[tuple[int, Array]]:
        """(first element, bits), these good until the next block. Raises NotFiniteError, MachineError `checkpoints.gpu_memory`.

        What is not a sum of pairs (biases, modules_to_save), and DoRA on a tensor that is in × out, is left to the processor.
        """
        has_magnitude = any(pair.magnitude is not None for pair in change.pairs)
        if not change.pairs or change.additions or (has_magnitude and change.pairs[0].is_transposed):
            return changed_blocks(source, change)
        return self._sums(source, change)

    def _sums(self, source: DiskTensor, change: Change) -> Iterator[tuple[int, Array]]:
        lane = self._lane()
        start = change.replacement or source
        rows, width = matrix_shape(source)
        step = max(1, BLOCK_ELEMENTS // width)
        try:
            with lane.stream():
                factors, magnitude = self._load(change)
            kept = lane.pinned("read", step * width * NUMPY_TYPES[start.dtype].itemsize + 3 * ALIGNMENT_BYTES)
            for row, raw in read_rows(start, rows, width, step, memory=kept):
                end = min(rows, row + step)
                with lane.stream():
                    parts = [(left[row:end], right) for left, right in factors]
                    scale = None if magnitude is None else magnitude[row:end]
                    result, is_finite = self._block(raw, (start.dtype, source.dtype), parts, scale)
                    bits = lane.fetch(result, NUMPY_TYPES[source.dtype])
                    if not bool(is_finite):
                        raise NotFiniteError
                yield row * width, bits
        except self._torch.OutOfMemoryError as error:
            raise MachineError("checkpoints.gpu_memory") from error

    def _load(self, change: Change) -> tuple[list[tuple[Any, Any]], Any]:
        """Both factors of every pair, and DoRA's magnitude, on the GPU."""
        torch = self._torch
        factors = []
        for pair in change.pairs:
            loaded = load_pair(pair)
            factors.append(tuple(torch.from_numpy(part).to(self._device) for part in (loaded.left, loaded.right)))
        stored = next((pair.magnitude for pair in change.pairs if pair.magnitude is not None), None)
        if stored is None:
            return factors, None
        values = np.array(widen(stored.read(), stored.dtype), dtype=np.float32)
        return factors, torch.from_numpy(values).to(self._device)

    def _block(
        self, raw: Array, dtypes: tuple[str, str], parts: Sequence[tuple[Any, Any]], scale: Any
    ) -> tuple[Any, Any]:
        """`raw` of the first of `dtypes` plus the products of `parts`, in the second; and whether all of it is finite."""
        torch = self._torch
        delta = None
        for left, right in parts:
            delta = left @ right if delta is None else delta.add_(left @ right)
        assert delta is not None
        bits = torch.from_numpy(raw.view(_signed(raw.dtype))).to(self._device, non_blocking=True)
        values = bits.view(self._kind(dtypes[0])).reshape(delta.shape).float().add_(delta)
        if scale is not None:
            values *= (scale / torch.linalg.vector_norm(values, dim=1))[:, None]
        result = values.to(self._kind(dtypes[1]))
        return result, torch.isfinite(result).all()

    def _kind(self, dtype: str) -> Any:
        return {"F32": self._torch.float32, "F16": self._torch.float16, "BF16": self._torch.bfloat16}[dtype]

    def _lane(self) -> "_Lane":
        if not hasattr(self._lanes, "own"):
            self._lanes.own = _Lane(self._torch, self._device)
        lane: _Lane = self._lanes.own
        return lane


class _Lane:
    """A stream and the pinned memory of one thread, used again for every block."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch, self._device = torch, device
        self._stream = torch.cuda.Stream(device) if device.type == CUDA else None
        self._memory: dict[str, Any] = {}

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._torch.cuda.stream(self._stream)

    def pinned(self, name: str, size: int) -> Bytes:
        """`size` bytes that the GPU reads and writes without the processor; the same as before where they are enough."""
        if name not in self._memory or self._memory[name].numel() < size:
            is_pinned = self._stream is not None
            self._memory[name] = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=is_pinned)
        memory: Bytes = self._memory[name].numpy()
        return memory

    def fetch(self, result: Any, kind: np.dtype[Any]) -> Array:
        """The bits of `result` in this thread's memory; waits until all that it asked of the GPU is done."""
        count = result.numel()
        bits = self.pinned("result", count * kind.itemsize)[: count * kind.itemsize].view(_signed(kind))
        self._torch.from_numpy(bits).copy_(result.reshape(-1).view(self._integer(kind)), non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return bits.view(kind)

    def _integer(self, kind: np.dtype[Any]) -> Any:
        return self._torch.int16 if kind.itemsize == 2 else self._torch.int32


def _signed(kind: np.dtype[Any]) -> np.dtype[Any]:
    """An integer type as wide as `kind` that torch has: it moves bits, whatever they mean."""
    return np.dtype(np.int16) if kind.itemsize == 2 else np.dtype(np.int32)
